"""Our models in EleutherAI's lm-eval: `--model megatron_dlm --model_args path=DIRECTORY`.

Installed as an entry point of the group `lm_eval.models`, where lm-eval after 0.4.13 looks for
models; for the releases before there is lm_eval_command.py.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from megatron_dlm.evaluation.likelihood import (
    MaskDraws,
    Request,
    check_objective,
    longest_text,
    score,
)
from megatron_dlm.generation.hybrid_samplers import HybridDecoding
from megatron_dlm.generation.masked_samplers import MaskedDecoding
from megatron_dlm.generation.samplers import TokenChoice
from megatron_dlm.generation.texts import Sampling, generate_texts
from megatron_dlm.hf.load import LoadedModel, load_model
from megatron_dlm.runtime.device import choose_device

_BATCH_SIZE = 16
_LOGGER = logging.getLogger(__name__)


class MegatronDLM(LM):
    """Log-likelihoods (diffusion: their lower bound) and greedy texts of one model.

    What is longer than the model's window is cut as `windows` says. A text without context follows
    an end of document, for every kind of model alike.
    """

    def __init__(
        self,
        path: str,
        *,
        step: int | None = None,
        device: str | None = None,
        precision: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        num_samples: int = 128,
        enumerate_masks: str = "auto",
        seed: int = 0,
        max_new_tokens: int = 256,
        num_steps: int | None = None,
        block_size: int | None = None,
    ) -> None:
        """path: run directory, checkpoint or Hugging Face directory. num_samples, enumerate_masks
        and seed: see `MaskDraws`. num_steps, block_size: of generating diffusion models, which
        take the surest token of every step; by default one per step, and masked diffusion all in
        one block."""
        del max_batch_size  # lm-eval's search for a batch size, which we do not take part in
        loaded = load_model(path, device=_choose_device(device), dtype=precision, step=step)
        is_given = batch_size is not None and not str(batch_size).startswith("auto")
        size = int(batch_size or 0) if is_given else _BATCH_SIZE
        draws = MaskDraws(num_samples, enumerate_masks, seed)  # type: ignore[arg-type]
        self._open(loaded, draws, size, max_new_tokens, (num_steps, block_size))

    @classmethod
    def of(
        cls, model: LoadedModel, *, draws: MaskDraws, batch_size: int, max_new_tokens: int = 256
    ) -> MegatronDLM:
        """The adapter of a model that is loaded already."""
        adapter = cls.__new__(cls)
        adapter._open(model, draws, batch_size, max_new_tokens, (None, None))
        return adapter

    def _open(
        self,
        model: LoadedModel,
        draws: MaskDraws,
        batch_size: int,
        max_new_tokens: int,
        decoding: tuple[int | None, int | None],
    ) -> None:
        super().__init__()
        check_objective(model)
        if model.tokenizer is None:
            raise ValueError(f"{model.source} has no tokenizer; tasks are text and need one")
        self._model, self._tokenizer = model, model.tokenizer
        self._draws, self._batch_size, self._max_new_tokens = draws, batch_size, max_new_tokens
        self._decoding = decoding
        self._limit = longest_text(model)
        ids = (model.tokenizer.eod_id, model.eos_token_id, model.tokenizer.bos_id)
        self._start = next(((start,) for start in ids if start is not None), ())

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into the results beside the scores."""
        return {
            "path": self._model.source,
            "objective": self._model.objective_kind,
            "step": self._model.facts.get("step"),
            "num_samples": self._draws.num_samples,
            "enumerate_masks": self._draws.enumerate_masks,
            "noise_seed": self._draws.seed,
        }

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log p(continuation | context) in nats, whether greedy decoding would write it)."""
        pairs = self._encode_pairs([request.args for request in requests])
        return self._score(pairs, with_greedy=True)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """log p(text) in nats."""
        encoded = self._tokenizer.encode_batch([request.args[0] for request in requests])
        texts = [Request(self._start, tuple(tokens)) for tokens in encoded]
        return [log_prob for log_prob, _ in self._score(texts, with_greedy=False)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Continuations up to the first stop text, the end of the document, or the most tokens."""
        texts = [""] * len(requests)
        groups: defaultdict[tuple[int, float], list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            options = request.args[1]
            asked = options.get("max_gen_toks", options.get("max_new_tokens", self._max_new_tokens))
            temperature = (
                float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0
            )
            groups[min(int(asked), self._model.max_length - 1), temperature].append(number)
        for (num_tokens, temperature), numbers in groups.items():
            prompts = [self._fitting(requests[number].args[0], num_tokens) for number in numbers]
            sampling = self._sampling(num_tokens, temperature)
            found = generate_texts(self._model, prompts, sampling, batch_size=self._batch_size)
            for number, text in zip(numbers, found, strict=True):
                texts[number] = cut_at_stop(text.text, requests[number].args[1].get("until"))
        return texts

    def _sampling(self, num_tokens: int, temperature: float) -> Sampling:
        num_steps, block_size = self._decoding
        return Sampling(
            num_tokens,
            choice=TokenChoice(temperature),
            decoding=MaskedDecoding("low_confidence", num_steps=num_steps, block_size=block_size),
            hybrid=HybridDecoding("adaptive", num_steps=num_steps),
            seed=self._draws.seed,
        )

    def _fitting(self, text: str, num_new: int) -> str:
        """The text, or its longest end that leaves room for the new tokens."""
        room = self._model.max_length - num_new
        tokens = self._tokenizer.encode(text)
        keep = room
        while len(tokens) > room:
            text = self._tokenizer.decode(tokens[-keep:])
            tokens = self._tokenizer.encode(text)
            keep -= 1  # the cut text may be encoded in other pieces
        return text

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Request]:
        """Context and continuation as tokens of the text they are together.

        Blanks at the end of the context belong to the continuation, whose tokens are those behind
        the number of tokens of the context alone.
        """
        contexts = [context.rstrip() for context, _ in pairs]
        whole = self._tokenizer.encode_batch([context + text for context, text in pairs])
        lengths = map(len, self._tokenizer.encode_batch(contexts))
        found = []
        for tokens, length in zip(whole, lengths, strict=True):
            length = min(length, len(tokens) - 1)  # the continuation may have joined the context
            prompt, answer = tuple(tokens[:length]), tuple(tokens[length:])
            found.append(Request(prompt or self._start, answer))
        return found

    def _score(self, requests: Sequence[Request], *, with_greedy: bool) -> list[tuple[float, bool]]:
        """Log-probability of every answer, and whether greedy decoding would write it."""
        pieces = [windows(request, self._limit) for request in requests]
        found = iter(
            score(
                self._model,
                [piece for parts in pieces for piece in parts],
                draws=self._draws,
                batch_size=self._batch_size,
                with_greedy=with_greedy,
            )
        )
        own = [list(islice(found, len(parts))) for parts in pieces]
        return [
            (sum(part.log_prob for part in parts), all(part.is_greedy for part in parts))
            for parts in own
        ]


def _choose_device(asked: str | None) -> torch.device:
    """lm-eval asks for cuda where its user asked for nothing, so cuda is only a wish."""
    device = choose_device("cpu" if asked == "cpu" else "auto")
    if asked is not None and not asked.startswith(device.type):
        _LOGGER.warning("device is %s, but torch sees no GPU: running on the CPU", asked)
    return device


def windows(request: Request, limit: int) -> list[Request]:
    """The request in pieces of at most `limit` tokens that together score its answer once.

    A prompt loses its beginning before an answer is cut. Of a longer answer every piece but the
    first has the token before it as prompt, the last one as many as fit.
    """
    text, first = (*request.prompt, *request.answer), len(request.prompt)
    pieces = []
    while first < len(text):
        stop = min(first + limit - (first > 0), len(text))
        pieces.append(Request(text[max(0, stop - limit) : first], text[first:stop]))
        first = stop
    return pieces


def cut_at_stop(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first of the stop texts that occurs in it."""
    stops = [until] if isinstance(until, str) else until or []
    return text[: min((place for stop in stops if stop and (place := text.find(stop)) >= 0),
                      default=len(text))]  # fmt: skip
