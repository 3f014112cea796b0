"""lm-eval's Hugging Face model with bounded memory and a record of what did not fit into the context."""

from __future__ import annotations

import math

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# On one busy CPU core, Llamas with vocabularies of 2,048 and 49,152 ran 4,000 to 6,000 and 500 to 680 tokens a second
# without a trend from 256 to 8,192 tokens a batch, so there these only bound memory. Not yet tuned on a GPU.
MAX_BATCH = 64
MAX_BATCH_TOKENS = 8192
# Logits and their log-softmax, the largest tensors by far, are both [batch, length, vocabulary] in float32.
LOGITS_BYTES = {"cpu": 2**30, "cuda": 2**32}

# ((context, continuation) as text, context token ids, continuation token ids)
Request = tuple[tuple[str, str], list[int], list[int]]


class BoundedHFLM(HFLM):
    """HFLM around a loaded model.

    Its batch size "auto" comes from the longest request and a token budget: lm-eval's own detection runs the model on
    full-length batches five times, minutes on a CPU. When a batch does not fit into memory it is halved and the task's
    requests start again; lm-eval takes the longest first, so that happens at once or not at all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int | str,
        max_length: int,
    ) -> None:
        # The log-softmax of bfloat16 logits has about 3 digits, which makes ties of close choices.
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=1 if batch_size == "auto" else batch_size,
            max_length=max_length,
            softmax_dtype="float32",
        )
        self._auto = batch_size == "auto"
        self.truncated: set[tuple[str, str]] = set()
        """(context, continuation) pairs that were cut to ``max_length`` tokens."""

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-probability and greediness of each continuation, in the order of ``requests``.

        Raises:
            ValueError: a log-probability is NaN.
        """
        fitted = [self._fit(request) for request in requests]
        if self._auto:
            self.batch_size_per_gpu = self._batch_size(max(len(context) + len(cont) for _, context, cont in fitted))
        while True:
            try:
                results = super()._loglikelihood_tokens(fitted, disable_tqdm, override_bs)
                break
            except RuntimeError as error:
                if self.batch_size_per_gpu == 1 or not _out_of_memory(error):
                    raise
            # Outside of the handler, where the failed batch is no longer referenced.
            self.batch_size_per_gpu //= 2
            torch.cuda.empty_cache()
        if any(math.isnan(logprob) for logprob, _ in results):
            raise ValueError("a log-probability is NaN: the model's logits are broken")
        return results

    def _fit(self, request: Request) -> Request:
        """Count a request that is too long; HFLM itself drops its leftmost tokens.

        HFLM refuses a continuation longer than the context length. Its first tokens become context here, so that it is
        cut from the left like everything else.
        """
        text, context, continuation = request
        if len(context) + len(continuation) > self.max_length + 1:  # the last token is predicted, never fed
            self.truncated.add(text)
            overflow = max(0, len(continuation) - self.max_length)
            return text, context + continuation[:overflow], continuation[overflow:]
        return request

    def _batch_size(self, tokens: int) -> int:
        """Requests of ``tokens`` tokens that fit into the budget, at least one."""
        vocabulary = self.config.get_text_config().vocab_size
        logits_bytes = LOGITS_BYTES.get(self.device.type, LOGITS_BYTES["cuda"])
        budget = min(MAX_BATCH_TOKENS, logits_bytes // (2 * 4 * vocabulary))
        return max(1, min(MAX_BATCH, budget // min(tokens, self.max_length)))


def _out_of_memory(error: RuntimeError) -> bool:
    message = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "out of memory" in message
        or "can't allocate memory" in message  # the CPU allocator's words
    )
