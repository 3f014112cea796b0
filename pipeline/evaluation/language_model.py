"""lm-eval's Hugging Face model with bounded memory, each context run once, and a record of what did not fit."""

from __future__ import annotations

import math

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# On one busy CPU core, Llamas with vocabularies of 2,048 and 49,152 ran 4,000 to 6,000 and 500 to 680 tokens a second
# without a trend from 256 to 8,192 tokens a batch, so there these only bound memory. Not yet tuned on a GPU.
MAX_BATCH = 64
MAX_BATCH_TOKENS = 8192
# Logits, the largest tensor by far, and a copy of them: [batch, length, vocabulary] in float32.
LOGITS_BYTES = {"cpu": 2**30, "cuda": 2**32}

# ((context, continuation) as text, context token ids, continuation token ids)
Request = tuple[tuple[str, str], list[int], list[int]]


class BoundedHFLM(HFLM):
    """HFLM around a loaded model.

    Its batch size "auto" comes from the longest request and a token budget: lm-eval's own detection runs the model on
    full-length batches five times, minutes on a CPU. When a batch does not fit into memory it is halved.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int | str,
        max_length: int,
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=1 if batch_size == "auto" else batch_size,
            max_length=max_length,
        )
        self._auto = batch_size == "auto"
        self.truncated: set[tuple[str, str]] = set()
        """(context, continuation) pairs that were cut to ``max_length`` tokens."""

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: list[Request],
        disable_tqdm: bool = False,  # noqa: ARG002 - the signature of HFLM
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-probability and greediness of each continuation, in the order of ``requests``.

        A context is run once for all of its continuations, whose keys and values it leaves behind: with four choices
        of 8 tokens after 32, 64 tokens in place of 160. HFLM itself runs it once for each.

        Raises:
            ValueError: a log-probability is NaN.
        """
        fitted = [self._fit(request) for request in requests]
        if override_bs is not None:
            self.batch_size_per_gpu = override_bs
        elif self._auto:
            self.batch_size_per_gpu = self._batch_size(max(len(context) + len(cont) for _, context, cont in fitted))
        by_context: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, _) in enumerate(fitted):
            by_context.setdefault(tuple(context), []).append(number)
        # The longest first: what does not fit into memory fails at once.
        waiting = [number for context in sorted(by_context, key=len, reverse=True) for number in by_context[context]]
        results: dict[int, tuple[float, bool]] = {}
        while waiting:
            batch = waiting[: self.batch_size_per_gpu]
            try:
                found = self._score([fitted[number] for number in batch])
            except RuntimeError as error:
                if self.batch_size_per_gpu == 1 or not _out_of_memory(error):
                    raise
                found = None
            if found is None:
                # Outside of the handler, where the failed batch is no longer referenced.
                self.batch_size_per_gpu //= 2
                torch.cuda.empty_cache()
                continue
            results |= zip(batch, found, strict=True)
            waiting = waiting[len(batch) :]
        if any(math.isnan(logprob) for logprob, _ in results.values()):
            raise ValueError("a log-probability is NaN: the model's logits are broken")
        return [results[number] for number in range(len(requests))]

    def _score(self, batch: list[Request]) -> list[tuple[float, bool]]:
        """Log-probability and greediness of each continuation of a batch.

        Shapes: C different contexts padded on the left to length L, B continuations padded on the right to length T.
        """
        contexts = list(dict.fromkeys(tuple(context) for _, context, _ in batch))
        rows = [contexts.index(tuple(context)) for _, context, _ in batch]
        length, longest = max(map(len, contexts)), max(len(cont) for _, _, cont in batch)
        tokens_CL, mask_CL = (torch.zeros(len(contexts), length, dtype=torch.long) for _ in range(2))
        for row, context in enumerate(contexts):
            tokens_CL[row, length - len(context) :] = torch.tensor(context)
            mask_CL[row, length - len(context) :] = 1
        targets_BT = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, (_, _, cont) in enumerate(batch):
            targets_BT[row, : len(cont)] = torch.tensor(cont)
        tokens_CL, mask_CL, targets_BT = (t.to(self.device) for t in (tokens_CL, mask_CL, targets_BT))
        out = self.model(
            input_ids=tokens_CL,
            attention_mask=mask_CL,
            position_ids=(mask_CL.cumsum(1) - 1).clamp_min(0),
            use_cache=longest > 1,
            logits_to_keep=1,
        )
        of_context = torch.tensor(rows, device=self.device)
        scores = [_scores(out.logits[:, -1:][of_context], targets_BT[:, :1])]
        if longest > 1:
            out.past_key_values.batch_select_indices(of_context)
            mask_BL = mask_CL[of_context]
            later = self.model(
                input_ids=targets_BT[:, :-1],
                attention_mask=torch.cat([mask_BL, torch.ones_like(targets_BT[:, :-1])], dim=1),
                position_ids=mask_BL.sum(1, keepdim=True) + torch.arange(longest - 1, device=self.device),
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            scores.append(_scores(later.logits, targets_BT[:, 1:]))
        logprobs_BT, greedy_BT = (torch.cat(parts, dim=1) for parts in zip(*scores, strict=True))
        return [
            (float(logprobs_BT[row, : len(cont)].sum()), bool(greedy_BT[row, : len(cont)].all()))
            for row, (_, _, cont) in enumerate(batch)
        ]

    def _fit(self, request: Request) -> Request:
        """Cut a request that is too long on its left, as HFLM does, and note it.

        A continuation longer than the context length is cut like everything else: its first tokens become context.
        """
        text, context, continuation = request
        overflow = len(context) + len(continuation) - (self.max_length + 1)  # the last token is predicted, never fed
        if overflow <= 0:
            return request
        self.truncated.add(text)
        seen = max(0, len(continuation) - self.max_length)
        return text, (context + continuation[:seen])[overflow:], continuation[seen:]

    def _batch_size(self, tokens: int) -> int:
        """Requests of ``tokens`` tokens that fit into the budget, at least one."""
        vocabulary = self.config.get_text_config().vocab_size
        logits_bytes = LOGITS_BYTES.get(self.device.type, LOGITS_BYTES["cuda"])
        budget = min(MAX_BATCH_TOKENS, logits_bytes // (2 * 4 * vocabulary))
        return max(1, min(MAX_BATCH, budget // min(tokens, self.max_length)))


def _scores(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target, and whether it is the most likely token, both [B, T]."""
    # In float32: log-probabilities of bfloat16 have about 3 digits, which makes ties of close choices.
    logits_BTV = logits_BTV.float()
    chosen_BT = logits_BTV.gather(-1, targets_BT[:, :, None])[:, :, 0]
    return chosen_BT - logits_BTV.logsumexp(-1), logits_BTV.argmax(-1) == targets_BT


def _out_of_memory(error: RuntimeError) -> bool:
    message = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "out of memory" in message
        or "can't allocate memory" in message  # the CPU allocator's words
    )
