"""The reference for the sampler: the definitions of `SamplingParams` in numpy's float64."""

import numpy as np
import torch

from engine.plan import NewSequence
from engine.request import SamplingParams
from engine.run.noise import seed_bits, uniform
from engine.run.sampling.state import Row, SamplingState


def row(params: SamplingParams, *, vocab_size: int, position: int = 0, choice: int = 0, prompt=(), output=(), sequence: int = 0) -> Row:
    """A row whose sequence has these tokens. Without ``output`` its position is arbitrary."""
    opening = NewSequence(sequence, choice, len(prompt), params, history=tuple(prompt) + tuple(output) if params.needs_history else ())
    return Row(SamplingState(opening, vocab_size=vocab_size), len(output) or position)


def edited_logits(logits: np.ndarray, params: SamplingParams, *, prompt=(), output=(), position: int = 0) -> np.ndarray:
    number = np.float32  # the precision in which equal logits must stay equal
    logits = logits.astype(number)
    repetition = number(params.repetition_penalty)
    for token in set(prompt) | set(output):
        logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
    for token in set(output):
        logits[token] -= number(params.presence_penalty)
        logits[token] -= number(params.frequency_penalty) * number(list(output).count(token))
    for token, value in params.logit_bias:
        logits[token] += number(value)
    if (len(output) or position) < params.min_tokens:
        logits[list(params.stop_token_ids)] = -np.inf
    return logits.astype(np.float64)


def probabilities(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities of all ids after temperature and filters. Of equal logits the lower id counts as the higher one."""
    scaled = logits / max(params.temperature, 1e-300)
    order = np.lexsort((np.arange(len(logits)), -logits)).tolist()
    kept = order[: params.top_k] if params.top_k > 0 else order
    p = np.zeros(len(logits))
    p[kept] = np.exp(scaled[kept] - scaled.max())
    p /= p.sum()
    if params.top_p < 1:
        nucleus, reached = [], 0.0
        for token in kept:
            if reached >= params.top_p:
                break
            nucleus.append(token)
            reached += p[token]
        kept = nucleus
    least = params.min_p * p.max()
    kept = [token for token in kept if p[token] >= least]
    q = np.zeros_like(p)
    q[kept] = p[kept]
    return q / q.sum()


def slow_sample(logits: np.ndarray, params: SamplingParams, *, choice: int = 0, prompt=(), output=(), position: int = 0) -> int:
    logits = edited_logits(logits, params, prompt=prompt, output=output, position=position)
    if params.temperature == 0:
        return int(np.argmax(logits))
    place = len(output) or position
    u = uniform(torch.tensor([seed_bits(params.seed)]), torch.tensor([choice]), torch.tensor([place])).item()
    sums = np.cumsum(probabilities(logits, params))
    return int(np.searchsorted(sums, u * sums[-1], side="right"))
