# One image for CPU and GPU: PyTorch's wheels carry CUDA, and nothing is compiled.
# docker build --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu . makes a small CPU-only one.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG PIP_EXTRA_INDEX_URL=""
# --ray adds what nodes of a cluster need (deploy/ray).
ARG INSTALL=--energy
ENV HOME=/home/mmtad PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
# Only what decides which packages are installed, so that a change of the code reuses this layer.
COPY LICENSE README.md constraints.txt pyproject.toml ./
COPY scripts/install scripts/install
COPY decoding/__init__.py decoding/
COPY server/__init__.py server/
RUN scripts/install "${INSTALL}"
COPY models/SmolLM2-135M-Instruct-draft models/SmolLM2-135M-Instruct-draft
COPY decoding decoding
# The embedded pair becomes checkpoints under HOME.
RUN .venv/bin/python -c "from decoding.embedded import prepare_embedded_pair; prepare_embedded_pair()"
COPY server server
# The server's user is not the one who builds, whose umask may be any.
RUN chmod -R a+rX decoding models server

FROM ${BASE}
ENV HOME=/home/mmtad HF_HOME=/models MMTAD_HOST=0.0.0.0 MMTAD_PORT=8000 \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
RUN groupadd --gid 10001 mmtad \
    && useradd --uid 10001 --gid 10001 --home-dir /home/mmtad --no-create-home --shell /usr/sbin/nologin mmtad
WORKDIR /app
COPY --from=build /app/.venv .venv
COPY --from=build /home/mmtad /home/mmtad
# All that the server writes: models from the hub, tokenizers as its API process reads them, measured costs.
RUN install --directory --owner=10001 --group=10001 /models /home/mmtad/.cache/mmtad/tokenizers \
    /home/mmtad/.cache/mmtad/costs
COPY --from=build /app/models models
COPY --from=build /app/decoding decoding
COPY --from=build /app/server server
USER 10001:10001
EXPOSE 8000
VOLUME ["/models"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["/app/.venv/bin/python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["/app/.venv/bin/python", "-m", "server"]
