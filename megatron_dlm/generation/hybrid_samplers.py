"""Samplers of hybrid diffusion (masks and uniform tokens); the noise is that of hybrid_noise.py.

Needs PyTorch, samplers.py and hybrid_noise.py, nothing else. Exported models carry a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_dlm.generation.hybrid_noise import (
    HybridNoise,
    Level,
    NoiseProcess,
    NoiseSchedule,
    Prior,
)
from megatron_dlm.generation.samplers import (
    DRAW_KEPT,
    DRAW_KIND,
    DRAW_NOISE,
    DRAW_TOKEN,
    PLAIN_CHOICE,
    Canvas,
    Denoiser,
    Samples,
    TokenChoice,
    Watch,
    draw_from,
    highest,
    num_before_end,
    uniform,
)

Method = Literal["ancestral", "adaptive"]

_DEFAULT_STEPS = 128
_PIECE_ELEMENTS = 1 << 22  # of one piece of float64 laws
_CORRECTION = 1 << 20  # steps of the correction draw other numbers than those of the sampling


@dataclass(frozen=True)
class HybridDecoding:
    """How noise becomes text.

    method: ancestral, the reverse process cut into num_steps steps, in which every slot may keep
    its token, take one of the model's, or turn into noise of the next level; adaptive, every step
    replaces the tokens_per_step tokens of the highest confidence: probability of the token under
    the prior times (probability of the likeliest - probability of the token). For masks that is the
    usual confidence.
    """

    method: Method = "ancestral"
    num_steps: int | None = None
    """Default: ancestral 128, adaptive as many as replace every new token once. More adaptive steps
    than tokens look at tokens again."""
    schedule: NoiseSchedule = "cosine"
    """ancestral: alpha = (1 + cos(pi t)) / 2 or 1 - t, t evenly from 0.999 down to 0.001."""
    prior: Prior = "noise"
    """The text before the first step: noise of log-SNR -9 as in training, masks, uniform tokens."""
    tokens_per_step: int = 1
    """adaptive: tokens that one step may replace."""
    patience: int | None = None
    """adaptive: a row is complete after so many steps in a row that change nothing."""
    correction_steps: int = 0
    """Then, up to so many times, replace the token that falls furthest behind the likeliest one."""
    correction_temperature: float = 0.1
    """Of the tokens drawn by the correction."""
    correction_patience: int = 32
    """The correction ends after so many steps in a row in which the share of tokens that the model
    itself finds likeliest has not grown beyond its maximum."""

    def __post_init__(self) -> None:
        kinds = (("method", Method), ("schedule", NoiseSchedule), ("prior", Prior))
        for name, kind in kinds:
            if getattr(self, name) not in get_args(kind):
                names = ", ".join(get_args(kind))
                raise ValueError(f"{name} is {getattr(self, name)!r}; use one of {names}")
        for name in ("num_steps", "tokens_per_step", "patience", "correction_patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name in ("correction_steps", "correction_temperature"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        self._check_meaning()

    def _check_meaning(self) -> None:
        if self.method == "ancestral" and (self.tokens_per_step, self.patience) != (1, None):
            raise ValueError("tokens_per_step and patience belong to method adaptive")
        if self.method == "adaptive" and self.schedule != "cosine":
            raise ValueError(f"schedule is {self.schedule}; it belongs to method ancestral")
        settings = (self.correction_temperature, self.correction_patience)
        if not self.correction_steps and settings != (0.1, 32):
            raise ValueError(
                "correction_temperature and correction_patience have no meaning without "
                "correction_steps; set it"
            )


REVERSE_DIFFUSION = HybridDecoding()


@torch.no_grad()
def sample_hybrid(
    denoiser: Denoiser,
    prompt: Tensor,
    *,
    mask_id: int,
    vocab_size: int,
    noise: HybridNoise,
    num_tokens: int = 0,
    decoding: HybridDecoding = REVERSE_DIFFUSION,
    choice: TokenChoice = PLAIN_CHOICE,
    prompt_attention: bool = False,
    valid: Tensor | None = None,
    eos_id: int | None = None,
    seed: int = 0,
    row_ids: Tensor | None = None,
    watch: Watch | None = None,
) -> Samples:
    """Continue `prompt` (int64 [b, P]) by `num_tokens` tokens, and fill the masks in it.

    What is given stays. vocab_size: N, the ids with the mask. prompt_attention: what is given does
    not see what is new, as models with prompts are trained; a prompt is then computed only once,
    unless experts choose among all tokens. The result holds no mask and no forbidden id among the
    new tokens, and nothing but ends behind the first new `eos_id`. All else is as in
    `sample_autoregressive`.
    """
    choice = replace(choice, forbidden_ids=tuple({*choice.forbidden_ids, mask_id}))
    canvas = Canvas(prompt, num_tokens, filler=mask_id, valid=valid, row_ids=row_ids)
    process = NoiseProcess(noise, mask_id, vocab_size)
    _check(decoding, process)
    text = _Text(denoiser, canvas, process, choice, prompt_attention=prompt_attention)
    text.seed, text.watch = seed, watch
    text.draw_prior(decoding.prior)
    if decoding.method == "ancestral":
        num_steps = decoding.num_steps or _DEFAULT_STEPS
        text.run_ancestral(process.levels(decoding.schedule, num_steps))
    else:
        text.run_adaptive(decoding)
    text.remove_noise()
    if decoding.correction_steps:
        text.correct(decoding)
    tokens = text.tokens
    if eos_id is not None:
        is_end = text.is_new & (tokens == eos_id)
        tokens = tokens.masked_fill(text.is_new & (is_end.cumsum(1) > 0), eos_id)
    return Samples(tokens, num_before_end(tokens, text.is_new, eos_id), text.num_evaluations)


def _check(decoding: HybridDecoding, process: NoiseProcess) -> None:
    """Refuse what a model of this noise has never seen."""
    if decoding.correction_steps and not process.has_uniform:
        raise ValueError(
            "correction_steps need a model trained with uniform noise; this one saw masks only"
        )
    if decoding.prior == "uniform" and process.prior_share == 0:
        raise ValueError("prior uniform needs uniform noise; this model saw masks only")
    if decoding.prior == "mask" and process.prior_share == 1:
        raise ValueError("prior mask needs noise with masks; this model saw uniform tokens only")


class _Text:
    """The rows while they turn from noise into text."""

    seed: int = 0
    watch: Watch | None = None

    def __init__(
        self,
        denoiser: Denoiser,
        canvas: Canvas,
        process: NoiseProcess,
        choice: TokenChoice,
        *,
        prompt_attention: bool,
    ) -> None:
        self.tokens = canvas.tokens
        """int64 [b, L]"""
        self.is_new = (canvas.tokens == process.mask_id) & canvas.is_real
        """bool [b, L], with n slots in all."""
        self.num_evaluations = canvas.zeros()
        self._process, self._choice = process, choice
        self._place = canvas.rows[self.is_new], canvas.positions[self.is_new]
        self._reader = _Reader(denoiser, canvas, self.is_new, prompt_attention=prompt_attention)

    def draw_prior(self, prior: Prior) -> None:
        """Noise in all new slots."""
        drawn = self._process.draw(
            self._process.share_of(prior), self._draws(DRAW_KIND, -1), self._draws(DRAW_NOISE, -1)
        )
        self.tokens = self.tokens.masked_scatter(self.is_new, drawn)
        self._prior_share = self._process.share_of(prior)

    def run_ancestral(self, levels: list[Level]) -> None:
        """From level to level by p(z_s | z_t) = q_s(z_s) q(z_t | z_s) / q_t(z_t), all given the
        model's law of the clean token in the place of the clean token."""
        if not bool(self.is_new.any()):
            return
        for step, (now, after) in enumerate(pairwise(levels)):
            if now == after:  # outside the range of training, where levels stand still
                continue
            logits = self._reader.logits(self.tokens)
            self.num_evaluations += self.is_new.any(1)
            current = self.tokens[self.is_new]
            guess, of_current = self._guess(logits, current, step)
            # q(z_t | z_s) = ratio [z_t = z_s] + what comes new: with the first part the token is
            # kept, with the second z_s is drawn from q_s, whatever z_t is.
            noise_now = self._process.of_token(current, now.one_text_id, now.mask)
            noise_after = self._process.of_token(current, after.one_text_id, after.mask)
            before = after.clean * of_current + noise_after
            kept = now.clean / after.clean * before / (now.clean * of_current + noise_now)
            kept = kept.masked_fill(noise_now == 0, 1.0)  # no noise looks like this token
            kind = self._draws(DRAW_KIND, step)
            noisy = 1.0 - after.clean
            share = after.one_text_id * self._process.num_text_ids / noisy if noisy else 0.0
            fresh = self._process.draw(
                share, (kind - after.clean) / (noisy or 1.0), self._draws(DRAW_NOISE, step)
            )
            fresh = guess.where(kind < after.clean, fresh)
            chosen = current.where(self._draws(DRAW_KEPT, step) < kept, fresh)
            self._put(self.is_new, chosen)

    def run_adaptive(self, decoding: HybridDecoding) -> None:
        """Replace the most confident tokens, step by step."""
        num_new = self.is_new.sum(1)
        steps = -(-num_new // decoding.tokens_per_step)
        if decoding.num_steps is not None:
            steps = torch.full_like(steps, decoding.num_steps)
        share = self._prior_share
        per_text_id = share / self._process.num_text_ids
        self._replace(
            steps,
            choice=self._choice,
            first_draw=0,
            per_step=decoding.tokens_per_step,
            patience=decoding.patience,
            weigh=lambda tokens: self._process.of_token(tokens, per_text_id, 1.0 - share),
        )

    def correct(self, decoding: HybridDecoding) -> None:
        """Replace tokens of a finished text that the model would not write."""
        self._replace(
            torch.full_like(self.num_evaluations, decoding.correction_steps),
            choice=replace(self._choice, temperature=decoding.correction_temperature),
            first_draw=_CORRECTION,
            per_step=1,
            patience=decoding.correction_patience,
            weigh=None,
        )

    def remove_noise(self) -> None:
        """Draw a token wherever a mask or a forbidden id is left."""
        forbidden = torch.tensor(self._choice.forbidden_ids, device=self.tokens.device)
        left = self.is_new & torch.isin(self.tokens, forbidden)
        if not bool(left.any()):
            return
        logits = self._reader.logits(self.tokens)
        self.num_evaluations += left.any(1)
        drawn = self._draw_at(left, logits, self._choice, _CORRECTION - 1)
        self._put(left, drawn)

    def _replace(
        self,
        num_steps: Tensor,
        *,
        choice: TokenChoice,
        first_draw: int,
        per_step: int,
        patience: int | None,
        weigh: Callable[[Tensor], Tensor] | None,
    ) -> None:
        """Up to num_steps (int64 [b]) times the tokens whose likeliest rival leads by most.

        weigh: what the lead of a token's rival counts; patience then runs out where nothing
        changes. Without it all count alike, and progress is a growing share of likeliest tokens.
        """
        is_open, is_stale = self.is_new.any(1), self.is_new.any(1)
        waited, num_changed = torch.zeros_like(num_steps), torch.zeros_like(num_steps)
        best_so_far = torch.full_like(num_steps.double(), -1.0 if weigh is None else 0.0)
        logits = lead = torch.zeros_like(self.tokens, dtype=torch.float64)
        for step in range(int(num_steps.max())):
            is_open = is_open & (step < num_steps)
            if bool((is_open & is_stale).any()):  # else nothing has changed since the last pass
                logits = self._reader.logits(self.tokens)
                self.num_evaluations += is_open & is_stale
                lead = self._lead(logits, choice)
            weight = 1.0 if weigh is None else weigh(self.tokens)
            worth = lead * weight
            chosen = highest(worth, self.is_new & (worth > 0) & is_open[:, None], per_step)
            is_open = is_open & chosen.any(1)  # nothing is left to gain
            if not bool(is_open.any()):
                return
            before = self.tokens
            self._put(chosen, self._draw_at(chosen, logits, choice, first_draw + step))
            is_stale = (self.tokens != before).any(1)
            num_changed = num_changed + is_stale
            settled = (self.is_new & (lead <= 0)).sum(1) / self.is_new.sum(1).clamp(min=1)
            progress = settled.double() if weigh is None else num_changed.double()
            waited = torch.where(progress > best_so_far, 0, waited + 1)
            best_so_far = torch.maximum(progress, best_so_far)
            if patience is not None:
                is_open = is_open & (waited < patience)

    def _guess(self, logits: Tensor, current: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """A clean token drawn for every new slot, int64 [n], and the model's probability of the
        token that is there, float64 [n]; logits [n, V]."""
        draws = self._draws(DRAW_TOKEN, step)
        guesses, shares = [], []
        for piece in _pieces(logits):
            law = self._choice.law(self._choice.allowed(logits[piece]))
            guesses.append(draw_from(law, draws[piece]))
            shares.append(law.gather(1, current[piece, None])[:, 0])
        return torch.cat(guesses), torch.cat(shares)

    def _lead(self, logits: Tensor, choice: TokenChoice) -> Tensor:
        """Probability of the likeliest token minus that of the token: float64 [b, L], 0 of others.

        Probabilities are the model's own, at temperature 1.
        """
        current = self.tokens[self.is_new]
        leads = []
        for piece in _pieces(logits):
            law = torch.softmax(choice.allowed(logits[piece]), dim=1)
            leads.append(law.amax(1) - law.gather(1, current[piece, None])[:, 0])
        whole = torch.zeros(self.tokens.shape, dtype=torch.float64, device=self.tokens.device)
        return whole.masked_scatter(self.is_new, torch.cat(leads))

    def _draw_at(self, chosen: Tensor, logits: Tensor, choice: TokenChoice, step: int) -> Tensor:
        """Tokens for some of the new slots (bool [b, L]); logits [n, V] of all of them."""
        which = chosen[self.is_new]
        allowed = choice.allowed(logits[which])
        return choice.draw(allowed, self._draws(DRAW_TOKEN, step)[which])

    def _draws(self, purpose: int, step: int) -> Tensor:
        """A uniform number for every new slot: float64 [n]."""
        return uniform(self.seed, purpose, *self._place, step)

    def _put(self, where: Tensor, tokens: Tensor) -> None:
        self.tokens = self.tokens.masked_scatter(where, tokens)
        if self.watch is not None:
            self.watch(self.tokens.clone())


class _Reader:
    """Logits [n, V] of the new slots, row by row."""

    def __init__(
        self, denoiser: Denoiser, canvas: Canvas, is_new: Tensor, *, prompt_attention: bool
    ) -> None:
        self._denoiser, self._valid, self._slots = denoiser, canvas.valid, canvas.slots
        self._is_new = is_new
        self._context = canvas.is_real & ~is_new if prompt_attention else None
        # What is given sees nothing new, so that its keys hold: all rows have to agree where it is.
        columns = is_new.any(0)
        is_common = bool((is_new == columns).all()) and not bool(columns.all())
        keeps_keys = prompt_attention and is_common
        self._cache = denoiser.new_cache(*is_new.shape) if keeps_keys else None
        self._later = self._slots[columns]

    def logits(self, tokens: Tensor) -> Tensor:
        if self._cache is None:
            return self._denoiser(
                tokens, valid=self._valid, wanted=self._is_new, context=self._context
            )
        slots, self._slots = self._slots, self._later
        return self._denoiser(
            tokens[:, slots],
            valid=self._valid,
            slots=slots,
            cache=self._cache,
            wanted=self._is_new[:, slots],
            context=self._context,
        )


def _pieces(logits: Tensor) -> list[slice]:
    """Rows of logits [n, V] that are worked on at once."""
    size = max(1, _PIECE_ELEMENTS // logits.shape[1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]
