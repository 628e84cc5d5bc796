// The server over fetch: its models, and one generation as a stream of chunks.

export class ApiError extends Error {
  /** @param {{message: string, param?: string|null, code?: string|null}} error @param {number|null} status */
  constructor(error, status) {
    super(error.message);
    this.param = error.param ?? null;
    this.status = status;
  }
}

export async function listModels(key) {
  const response = await ask("v1/models", key, {});
  return (await response.json()).data;
}

/** Yields the parsed chunks of one streamed generation; throws ApiError, or AbortError when stopped. */
export async function* generate(path, body, key, signal) {
  const response = await ask(path, key, { method: "POST", body: JSON.stringify(body), signal });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error, null);
    yield chunk;
  }
  throw new ApiError({ message: "The connection ended before the answer did. Run it again." }, null);
}

async function ask(path, key, options) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError({ message: `The server cannot be reached (${error.message}).` }, null);
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  throw new ApiError(answer?.error ?? { message: `The server answered ${response.status}.` }, response.status);
}

/** The `data` of server-sent events; comments and other fields are passed over. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      buffer += value;
      const blocks = buffer.split("\n\n");
      buffer = blocks.pop();
      for (const block of blocks) {
        if (block.startsWith("data: ")) yield block.slice("data: ".length);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
