"""Text of one request while its tokens arrive: whole characters only, and nothing that a stop string may yet take back.

Tokens are decoded in a short window, so the cost of a token does not grow with the text.
"""

from collections.abc import Callable, Sequence

PARTIAL = "\ufffd"  # what tokenizers put for bytes that are no character, or not yet one
PARTIAL_MOST = 3  # bytes of an unfinished character


def decoder_of(tokenizer) -> Callable[[Sequence[int]], str]:
    """tokens -> text without special tokens, as `tokenizer.decode(tokens, skip_special_tokens=True)`.

    Fast tokenizers are asked directly: transformers' own way around them takes ten times as long.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return lambda tokens: tokenizer.decode(list(tokens), skip_special_tokens=True)
    return lambda tokens: backend.decode(list(tokens), skip_special_tokens=True)


class TextStream:
    """The growing text of one continuation.

    `text` is what may be shown: it only grows, and never holds part of a character or of a stop string. decode: see
    `decoder_of`. stop: texts that end it: the first to be complete does, and is left out. `stopped`: one has.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: tuple[str, ...] = ()):
        self.text, self.stopped = "", False
        self._decode, self._stop = decode, stop
        # tokens[:_read] ended in a whole character; decoding starts at `_start`, where they did so the time before,
        # because some tokenizers (SentencePiece) drop the space before the first token they are given
        self._tokens: list[int] = []
        self._start = self._read = 0
        self._shown = ""  # what of the text of tokens[_start:] has been offered
        self._held = ""  # whole characters that may be the beginning of a stop string

    def add(self, token: int) -> str:
        """Text that the next token adds to what may be shown; often more or less than the token's own."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        return self._offer(self._whole(last=False), last=False)

    def finish(self) -> str:
        """The rest of the text, once no token will follow: what was held back, and U+FFFD for half a character."""
        return "" if self.stopped else self._offer(self._whole(last=True), last=True)

    def _whole(self, *, last: bool) -> str:
        """Characters that the tokens add to `_shown`, but for those at the end whose bytes may not all be there."""
        text = self._decode(self._tokens[self._start :])
        partial = 0 if last else min(len(text) - len(text.rstrip(PARTIAL)), PARTIAL_MOST)
        known = text.startswith(self._shown)
        if partial:
            new = text[len(self._shown) : -partial] if known else ""
            self._shown += new
            return new
        # Where single bytes are tokens (Llama 2), a byte that fits nowhere makes U+FFFD of the characters before it
        # as well; those stay as they were shown.
        new = text[len(self._shown) :] if known else self._decode(self._tokens[self._read :])
        self._start, self._read = self._read, len(self._tokens)
        self._shown = self._decode(self._tokens[self._start :])
        return new

    def _offer(self, new: str, *, last: bool) -> str:
        """Move what can no longer be part of a stop string to the text."""
        self._held += new
        if not self._stop:
            shown, self._held = self._held, ""
        else:
            # the first to be complete, wherever tokens end
            found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
            self.stopped = bool(found)
            keep = min(found)[1] if found else len(self._held) - (0 if last else self._begun())
            shown, self._held = self._held[:keep], self._held[keep:]
        self.text += shown
        return shown

    def _begun(self) -> int:
        """Length of the longest end of the held text that is the beginning of a stop string."""
        longest = min(len(self._held), max(map(len, self._stop)) - 1)
        for size in range(longest, 0, -1):
            tail = self._held[-size:]
            if any(stop.startswith(tail) for stop in self._stop):
                return size
        return 0
