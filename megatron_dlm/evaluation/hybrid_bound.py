"""The bound of hybrid diffusion, averaged over noise of all levels.

For the tokens x of an answer, the noise z of log-SNR l drawn with density p(l),

    -log p(answer | prompt)  <=  E_l E_z [ sum of w(z, x) / p(l) * (KL + IS) ]

(arXiv 2512.10858, Proposition 1). The terms of the two ends of the path are left out as in
training: about 1e-3 nats per token, with GIDD's mixing some 1e-2. All tokens share one level, and
the N levels of an answer are spread evenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dlm.evaluation.estimates import (
    Drawn,
    MaskDraws,
    Request,
    request_key,
    stratified_levels,
)
from megatron_dlm.evaluation.reading import Row, SlotReader, read_rows
from megatron_dlm.hf.load import LoadedModel
from megatron_dlm.objectives.hybrid import bound_weights
from megatron_dlm.objectives.noise import NoiseLevels, NoisePath, noise_path
from megatron_dlm.ops.counter_rng import Purpose, Stream, random_bits, to_uniform
from megatron_dlm.ops.mixture_loss import mixture_divergences


@dataclass(frozen=True)
class HybridBound:
    """The noise of a model, and how it reads a text."""

    path: NoisePath
    mask_id: int
    vocab_size: int
    prompt_attention: bool
    """Whether prompts were trained not to see what is noisy."""

    @classmethod
    def of(cls, model: LoadedModel) -> HybridBound:
        """That of a loaded model."""
        assert model.mask_token_id is not None
        return cls(
            path=noise_path(model.objective),
            mask_id=model.mask_token_id,
            vocab_size=model.model.config.vocab_size,
            prompt_attention=bool(model.model.config.prompt_attention),
        )

    def __call__(self, logits: Tensor, targets: Tensor, tokens: Tensor, log_snr: Tensor) -> Tensor:
        """Minus w (KL + IS) of every slot, float64 [n]: a `Measure`."""
        share, slope = self.path.mixing(log_snr)
        divergence, itakura_saito = mixture_divergences(
            logits,
            tokens,
            targets,
            log_snr,
            share,
            vocab_size=self.vocab_size,
            mask_token_id=self.mask_id,
            tp_group=None,
        )
        levels = NoiseLevels(log_snr, share, slope, torch.ones_like(log_snr))
        weight = bound_weights(
            levels, tokens, targets, mask_token_id=self.mask_id, vocab_size=self.vocab_size
        )
        return -weight * (divergence + itakura_saito).double()

    def noised(
        self, text: Tensor, scored: Tensor, levels: NoiseLevels, key: Tensor, seed: int
    ) -> Tensor:
        """The text (int64 [s]) with noise of N levels at the scored slots (bool [s]): [N, s].

        A mask that stands in the text stays.
        """
        samples, slots = torch.arange(len(levels.log_snr)), torch.arange(len(text))
        keys = random_bits(seed, Stream.LIKELIHOOD, Purpose.VALUE, key, samples)[:, None]
        noise, kind, token = (
            random_bits(seed, Stream.LIKELIHOOD, purpose, keys, slots[None])
            for purpose in (Purpose.MASK, Purpose.NOISE_KIND, Purpose.NOISE_TOKEN)
        )
        text_id = token.remainder(self.vocab_size - 1)
        text_id = text_id + (text_id >= self.mask_id)
        is_uniform = to_uniform(kind) < levels.uniform_share[:, None]
        is_noise = to_uniform(noise) < torch.sigmoid(-levels.log_snr)[:, None]
        noisy = torch.where(is_uniform, text_id, self.mask_id)
        return torch.where(is_noise & scored & (text != self.mask_id), noisy, text)

    def row(self, tokens: Tensor, text: Tensor, scored: Tensor, log_snr: float) -> Row:
        """A noisy text, asked about the scored slots, whose first unscored ones are its prompt."""
        slots = (scored & (text != self.mask_id)).nonzero()[:, 0]
        num_context = int(scored.int().argmax()) if self.prompt_attention else 0
        return Row(tokens, slots, text[slots], num_context=num_context, log_snr=log_snr)

    def draw(self, request: Request, draws: MaskDraws) -> Drawn:
        """The inputs of one request."""
        key, text, scored = request_key(request), request.text, request.in_answer
        levels = self.path.at(
            stratified_levels(key, num_samples=draws.num_samples, seed=draws.seed)
        )
        noisy = self.noised(text, scored, levels, key, draws.seed)
        return Drawn(
            rows=[
                self.row(tokens, text, scored, log_snr)
                for tokens, log_snr in zip(noisy, levels.log_snr.tolist(), strict=True)
            ],
            weights=list(1.0 / levels.density),
            is_sum=False,
        )

    def greedy(
        self, reader: SlotReader, requests: Sequence[Request], *, batch_size: int
    ) -> set[int]:
        """The requests whose answer the model leaves as it is: every token is its likeliest."""
        rows = (self.row(one.text, one.text, one.in_answer, 0.0) for one in requests)
        answers = read_rows(reader, rows, batch_size)
        return {
            number
            for number, (row, said) in enumerate(answers)
            if bool((said.likeliest == row.targets).all())
        }
