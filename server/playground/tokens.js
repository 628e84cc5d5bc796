// From a chunk's choice to its tokens: {text, origin, logProb}. Each route tells them in its own way.

/** Completions: `text_offset` says where each token begins, in characters of the whole text. */
export class CompletionTokens {
  #shown = 0;

  read(choice) {
    const characters = Array.from(choice.text);
    const { text_offset: offsets, origins = [], token_logprobs: logProbs } = choice.logprobs;
    const starts = offsets.map((offset) => Math.max(offset - this.#shown, 0));
    this.#shown += characters.length;
    const tokens = starts.map((start, index) => ({
      text: characters.slice(start, starts[index + 1]).join(""),
      origin: origins[index],
      logProb: logProbs[index],
    }));
    const rest = characters.slice(0, starts[0]).join(""); // of a token that an earlier chunk brought
    return rest ? [{ text: rest, origin: null, logProb: null }, ...tokens] : tokens;
  }
}

/** Chat: every token has its bytes; what the chunk's text leaves out, as an end, shows nothing. */
export class ChatTokens {
  #decoder = new TextDecoder();

  read(choice) {
    let left = choice.delta.content ?? "";
    return (choice.logprobs?.content ?? []).map((entry) => {
      const decoded = this.#decoder.decode(new Uint8Array(entry.bytes), { stream: true });
      const text = left.startsWith(decoded) ? decoded : "";
      left = left.slice(text.length);
      return { text, origin: entry.origin, logProb: entry.logprob };
    });
  }
}
