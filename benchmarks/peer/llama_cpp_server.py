"""Serve GGUF files with llama.cpp's own HTTP server, out of the environment that has `xllamacpp`.

Run by the interpreter of that environment: nothing of this project is imported here.
"""

import argparse
import os
import signal
import threading

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--draft")
    parser.add_argument("--depth", type=int, default=3, help="the most that is drafted in one step")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024, help="per request")
    arguments = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = arguments.model
    params.hostnames, params.port = ["127.0.0.1"], arguments.port
    params.n_parallel = arguments.parallel
    params.n_ctx = arguments.context * arguments.parallel
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = arguments.threads
    params.cache_prompt = False  # nobody else here has seen a prompt before
    if arguments.draft:
        params.speculative.draft.mparams.path = arguments.draft
        params.speculative.draft.n_max = arguments.depth
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
    server = xllamacpp.Server(params)
    print(server.listening_address, xllamacpp.get_system_info(), flush=True)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
    os._exit(0)  # the server's own end waits for connections that clients keep


if __name__ == "__main__":
    main()
