"""The in-process sampler: a plain replica of the policy, batched, with a key/value cache.

Not here: continuous batching, paged caches, prefix caches across calls. Where generation is most of
the step, a server does it better. Nor top-p and top-k: the trainer computes log-probabilities of
the full distribution.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder
from torchtune.utils import get_world_size_and_rank
from tqdm import tqdm

from gspo.decoder import unique_state
from gspo.errors import NO_VALUE, DataError, InputError, require
from gspo.sampling.cached_decoder import CachedDecoder
from gspo.sampling.decode_graph import DecodeGraph
from gspo.sampling.fingerprint import special_ids, tokenizer_fingerprint, vocabulary_of
from gspo.sampling.kv_cache import KVCache
from gspo.types import Completion, Prompt, SamplingParams

# Bytes an entry of a large vocabulary's distribution while a token is drawn: 4 of the logits, 4 of
# the weights, 2 of a quarter of them in float64, and less than 1 of all the rest.
DRAW_BYTES = 11
# A larger vocabulary is inverted in two levels, first over blocks of so many entries.
_ONE_LEVEL = 4096
_BLOCK_SIZE = 512
_NUM_PARTS = 4

# Finished rows are dropped when this share or less is left: below it the copy of the cache pays for
# itself.
_COMPACT_BELOW = 0.75
# On a GPU, asking how many rows have finished waits for the device; a few steps too many cost less.
_CHECK_EVERY = {"cuda": 8}


@dataclass(frozen=True)
class _Draws:
    """The tokens drawn for N rows; what follows a row's stop token means nothing."""

    tokens: Tensor  # [max_new_tokens, N] int64
    logps: Tensor  # [max_new_tokens, N] float32 nats

    @classmethod
    def empty(cls, max_new_tokens: int, num_rows: int, device: torch.device) -> _Draws:
        """Return zeros to be filled."""
        shape = (max_new_tokens, num_rows)
        tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        logps = torch.zeros(shape, device=device)
        return cls(tokens, logps)

    def by_row(self) -> Iterator[tuple[list[int], list[float]]]:
        """Yield each row's tokens and log-probabilities."""
        tokens = self.tokens.t()
        logps = self.logps.t()
        return zip(tokens.tolist(), logps.tolist(), strict=True)


@dataclass
class _Running:
    """The rows of a batch that are still drawn: at first all, later those that had not ended."""

    rows: Tensor  # [M] int64, their columns in the draws
    has_ended: Tensor  # [M] bool
    num_left: int  # that had not ended at the last count

    @classmethod
    def all_of(cls, num_rows: int, device: torch.device) -> _Running:
        """Return all rows, none of which has ended."""
        rows = torch.arange(num_rows, device=device)
        has_ended = torch.zeros(num_rows, dtype=torch.bool, device=device)
        return cls(rows, has_ended, num_rows)

    def count(self) -> int:
        """Count the rows left and return how many have ended since the last count.

        It waits for the device.
        """
        num_rows = self.rows.numel()
        num_ended = int(self.has_ended.sum())
        num_left = num_rows - num_ended
        num_before = self.num_left
        self.num_left = num_left
        return num_before - num_left

    def drop_ended(self) -> Tensor:  # [M] int64
        """Drop the rows that have ended and return the indices of those kept."""
        is_left = ~self.has_ended
        indices = is_left.nonzero()
        kept = indices.flatten()
        self.rows = self.rows[kept]
        self.has_ended = self.has_ended[kept]
        return kept


class LocalSampler:
    """A sampler that draws with a decoder of its own, in the trainer's process.

    Args:
        build_decoder: makes an unsharded torchtune decoder; called once.
        tokenizer: decodes completions.
        stop_token_ids: end a completion; [] for none. None: the tokenizer's ``stop_tokens``, or
            its ``eos_id``.
        max_batch_size: completions drawn at once.
        max_prefill_tokens: prompt tokens that go through the decoder at once.
        progress: show a bar, on the first rank only.
        cuda_graphs: replay the decode steps from CUDA graphs, which saves their launches; the same
            numbers. Off by default, as it is not measured yet.

    Raises:
        InputError: The decoder has parts that the cached attention does not know, there is no stop
            token, or there are to be CUDA graphs on another device or of another library's cache.
    """

    def __init__(
        self,
        build_decoder: Callable[[], TransformerDecoder],
        tokenizer: Any,
        *,
        stop_token_ids: list[int] | None = None,
        max_batch_size: int = 512,
        max_prefill_tokens: int = 16384,
        progress: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        require(max_batch_size >= 1, "max_batch_size", max_batch_size, "must be at least 1")
        self._tokenizer = tokenizer
        self._max_batch_size = max_batch_size
        self._progress = progress
        self._version = 0
        # A prefetch thread samples while the trainer updates: a completion must not see half of the
        # new weights.
        self._lock = threading.Lock()
        self._model = build_decoder()
        self._model.eval()
        self._model.requires_grad_(False)
        self._decoder = _incremental(self._model, max_prefill_tokens)
        self._graph_stream = self._stream_for_graphs() if cuda_graphs else None
        self._fingerprint = tokenizer_fingerprint(tokenizer)
        self._stops = _choose_stops(tokenizer, stop_token_ids)
        self._is_stop = self._mark_stops()
        self._text_tokens = _text_tokens(tokenizer) - self._stops

    def _mark_stops(self) -> Tensor:  # [V] bool
        """Return which token ids are stop tokens."""
        stops = sorted(self._stops)
        outside = self._find_outside(stops)
        if outside is not None:
            must, remedy = self._outside_words(outside)
            raise InputError("stop_token_ids", NO_VALUE, must, remedy)
        vocab_size = self._vocab_size
        is_stop = torch.zeros(vocab_size, dtype=torch.bool)
        is_stop[stops] = True
        return is_stop.to(self._device)

    def _stream_for_graphs(self) -> torch.cuda.Stream:
        is_ours = isinstance(self._decoder, CachedDecoder)
        must = "needs a decoder of torchtune: the cache of this one grows by the step"
        require(is_ours, "cuda_graphs", True, must, "set it to False")
        device = self._device
        must = f"needs the sampler's decoder on a CUDA device, not on {device.type}"
        require(device.type == "cuda", "cuda_graphs", True, must, "set it to False")
        return torch.cuda.Stream(device)

    @property
    def _device(self) -> torch.device:
        return self._model.tok_embeddings.weight.device

    @property
    def _vocab_size(self) -> int:
        return self._model.tok_embeddings.num_embeddings

    def update(self, policy: Any, version: int) -> None:
        """Copy the policy's weights into the replica, one by one. Collective: every rank calls it.

        ``policy.full_state_dict()`` yields (name, full tensor) for every parameter of the decoder.

        Raises:
            InputError: The names or shapes are not those of the replica.
        """
        with self._lock, torch.no_grad():
            state = unique_state(self._model)
            missing = dict(state)
            for name, tensor in policy.full_state_dict():
                target: Any = missing.pop(name, None)
                _check_same_shape(name, tensor, target)
                target.copy_(tensor)
            if missing:
                first = min(missing)
                must = f"did not give {first} (of {len(missing)} missing)"
                remedy = "build policy and sampler replica with one builder"
                raise InputError("policy", NO_VALUE, must, remedy)
            self._version = version

    def sample(
        self,
        prompts: list[Prompt],
        *,
        group_size: int,
        params: SamplingParams,
        seeds: Sequence[int],
    ) -> list[list[Completion]]:
        """Draw ``group_size`` completions for each prompt, with their log-probabilities in nats.

        Each token is drawn by inverting the distribution function at one uniform number that the
        prompt's entry in ``seeds`` fixes for its completion and step. So a completion depends
        neither on ``max_batch_size`` nor on the other prompts nor on which completions have
        finished, but for rounding. The global generators are left alone. At temperature 0 the
        likeliest token is taken, and log-probabilities are those at temperature 1
        (``logps_of="raw"``).

        Raises:
            InputError: A value is out of range, a prompt has no seed, is empty, has ids outside the
                vocabulary, or leaves no room for ``max_new_tokens`` in the model's ``max_seq_len``.
        """
        self._check(prompts, group_size, params, seeds)
        prompts_of_rows: list[list[int]] = []
        for prompt in prompts:
            prompts_of_rows += [prompt.tokens] * group_size
        num_rows = len(prompts_of_rows)
        temperature = params.temperature
        uniforms = _uniforms(seeds, group_size, params.max_new_tokens)
        batches = _batches(prompts_of_rows, self._max_batch_size)
        completions: dict[int, Completion] = {}
        with self._lock, torch.inference_mode(), self._progress_bar(num_rows) as bar:
            for batch in batches:
                batch_prompts = [prompts_of_rows[row] for row in batch]
                batch_uniforms = uniforms[:, batch]
                draws = self._draw(batch_prompts, batch_uniforms, temperature, bar)
                for row, (tokens, logps) in zip(batch, draws.by_row(), strict=True):
                    completion = self._completion(tokens, logps, params)
                    completions[row] = completion
        return _in_groups(completions, group_size)

    def _progress_bar(self, num_rows: int) -> tqdm:
        _, rank = get_world_size_and_rank()
        is_shown = self._progress and rank == 0
        return tqdm(
            total=num_rows,
            desc="sample",
            unit="completion",
            leave=False,
            disable=not is_shown,
        )

    def _draw(
        self,
        prompts: list[list[int]],  # N of them, equal ones prefilled once
        uniforms: Tensor,  # [max_new_tokens, N] float64
        temperature: float,
        bar: tqdm,
    ) -> _Draws:
        max_new_tokens, num_rows = uniforms.shape
        device = self._device
        logits, cache = self._prefill(prompts, max_new_tokens)
        uniforms = uniforms.to(device)
        draws = _Draws.empty(max_new_tokens, num_rows, device)
        running = _Running.all_of(num_rows, device)
        decode_step = self._decode_step(cache)
        check_every = _CHECK_EVERY.get(device.type, 1)
        for step in range(max_new_tokens):
            rows = running.rows
            step_uniforms = uniforms[step, rows]
            drawn, logps = draw_tokens(logits, step_uniforms, temperature)
            draws.tokens[step, rows] = drawn
            draws.logps[step, rows] = logps
            running.has_ended |= self._is_stop[drawn]
            num_steps = step + 1
            if num_steps == max_new_tokens:
                break
            is_check_due = num_steps % check_every == 0
            if is_check_due:
                num_ended = running.count()
                bar.update(num_ended)
                num_left = running.num_left
                if num_left == 0:
                    break
                if num_left <= _COMPACT_BELOW * rows.numel():
                    kept = running.drop_ended()
                    cache.select(kept)
                    drawn = drawn[kept]
            logits = decode_step(drawn)
        bar.update(running.num_left)
        return draws

    def _decode_step(self, cache: KVCache) -> Callable[[Tensor], Tensor]:
        """Return what appends one token to every row and returns the logits of the next."""
        decoder = self._decoder
        if self._graph_stream is None:
            return partial(decoder.step, cache=cache)
        graph = DecodeGraph(decoder, cache, self._graph_stream)
        return graph.step

    def _prefill(self, prompts: list[list[int]], max_new_tokens: int) -> tuple[Tensor, KVCache]:
        """Return logits [N, V] and cache of N prompts, each distinct one computed once."""
        numbers: dict[tuple[int, ...], int] = {}
        distinct = []  # each prompt's number among the distinct ones
        distinct_prompts = []
        for tokens in prompts:
            key = tuple(tokens)
            if key not in numbers:
                numbers[key] = len(numbers)
                distinct_prompts.append(tokens)
            number = numbers[key]
            distinct.append(number)
        logits, cache = self._decoder.prefill(distinct_prompts)
        rows = torch.tensor(distinct, device=self._device)
        cache.expand(rows, max_new_tokens)
        return logits[rows], cache

    def _completion(
        self, tokens: list[int], logps: list[float], params: SamplingParams
    ) -> Completion:
        length = _length_to_stop(tokens, self._stops)
        has_stop = length is not None
        tokens = tokens[:length]
        text_tokens = [token for token in tokens if token in self._text_tokens]
        return Completion(
            tokens=tokens,
            logps=logps[:length],
            text=self._tokenizer.decode(text_tokens),
            finish_reason="stop" if has_stop else "length",
            temperature=params.temperature,
            logps_of="raw" if params.temperature == 0 else "processed",
            policy_version=self._version,
            tokenizer=self._fingerprint,
        )

    def _check(
        self,
        prompts: list[Prompt],
        group_size: int,
        params: SamplingParams,
        seeds: Sequence[int],
    ) -> None:
        temperature = params.temperature
        max_new_tokens = params.max_new_tokens
        is_in_range = 0.0 <= temperature < math.inf
        require(is_in_range, "temperature", temperature, "must be 0 (greedy) or more")
        require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "must be at least 1")
        require(group_size >= 1, "group_size", group_size, "must be at least 1")
        for prompt in prompts:
            self._check_prompt(prompt, max_new_tokens)
        num_seeds = len(seeds)
        num_prompts = len(prompts)
        if num_seeds != num_prompts:
            must = f"there are {num_seeds} for {num_prompts} prompts"
            raise InputError("seeds", NO_VALUE, must, "give one for each")

    def _check_prompt(self, prompt: Prompt, max_new_tokens: int) -> None:
        place = f"prompt {prompt.id}"
        max_seq_len = self._model.max_seq_len
        room = max_seq_len - max_new_tokens
        num_tokens = len(prompt.tokens)
        if not 0 < num_tokens <= room:
            raise DataError(
                place,
                NO_VALUE,
                f"has {num_tokens} tokens; from 1 to {room} fit beside max_new_tokens "
                f"{max_new_tokens} in the model's max_seq_len {max_seq_len}",
                "drop the prompt, lower max_new_tokens, or raise max_seq_len",
            )
        outside = self._find_outside(prompt.tokens)
        if outside is not None:
            must, remedy = self._outside_words(outside)
            raise DataError(place, NO_VALUE, must, remedy)

    def _find_outside(self, tokens: list[int]) -> int | None:
        """Return the first token id that is outside the model's vocabulary; None if none is."""
        vocab_size = self._vocab_size
        for token in tokens:
            is_inside = 0 <= token < vocab_size
            if not is_inside:
                return token
        return None

    def _outside_words(self, token: int) -> tuple[str, str]:
        """Return what is wrong with such a token id, and the remedy."""
        vocab_size = self._vocab_size
        must = f"token id {token} is outside the model's vocabulary of {vocab_size}"
        return must, "use the tokenizer that belongs to the model"


def _incremental(model: Any, max_prefill_tokens: int) -> Any:
    """Return a model's own incremental form if it has one, else torchtune's over our cache."""
    if hasattr(model, "incremental"):
        return model.incremental(max_prefill_tokens=max_prefill_tokens)
    return CachedDecoder(model, max_prefill_tokens=max_prefill_tokens)


def draw_tokens(
    logits: Tensor,  # [N, V] float32
    uniforms: Tensor,  # [N] float64 in [0, 1)
    temperature: float,
) -> tuple[Tensor, Tensor]:  # [N] int64, [N] float32 nats
    """Draw one token per row, and return it with its log-probability.

    It is drawn by inversion of the distribution function. Temperature 0 is greedy.
    """
    if temperature == 0:
        logps = torch.log_softmax(logits, -1)
        tokens = logits.argmax(-1, keepdim=True)
        token_logps = logps.gather(-1, tokens)
    else:
        peaks = logits.amax(-1, keepdim=True)
        weights = logits - peaks
        if temperature != 1.0:  # a pass over all entries
            weights.div_(temperature)
        weights.exp_()
        tokens, totals = _invert(weights, uniforms)
        shares = weights.gather(-1, tokens) / totals
        token_logps = shares.log()
    return tokens.squeeze(-1), token_logps.squeeze(-1).float()


def _invert(
    weights: Tensor,  # [N, V] float32, at least 0
    uniforms: Tensor,  # [N] float64 in [0, 1)
) -> tuple[Tensor, Tensor]:  # [N, 1] int64, [N, 1] float64
    """Return the tokens where the distribution functions pass these numbers, and the rows' sums.

    Sums are float64: in float32 those over a large vocabulary lose tokens rarer than 6e-8. For
    memory's sake a large vocabulary has them over blocks of entries, and over the entries of the
    one block that the token is in.
    """
    num_tokens = weights.shape[-1]
    shares = uniforms[:, None]
    is_large = num_tokens > _ONE_LEVEL
    sums = _block_sums(weights) if is_large else weights
    cumulative = sums.cumsum(-1, dtype=torch.float64)
    totals = cumulative[:, -1:]
    targets = shares * totals
    indices = _first_above(cumulative, targets)
    if not is_large:
        return indices, totals
    before = cumulative.gather(-1, indices) - sums.gather(-1, indices)
    starts = indices * _BLOCK_SIZE
    block = _entries_from(starts, weights)
    within = block.cumsum(-1, dtype=torch.float64)
    inside = _move_inside(targets - before, within)
    tokens = starts + _first_above(within, inside)
    return tokens.clamp_(max=num_tokens - 1), totals


def _block_sums(
    weights: Tensor,  # [N, V] float32
) -> Tensor:  # [N, B] float64, the last block is the shortest and may be empty
    num_blocks = weights.shape[-1] // _BLOCK_SIZE
    num_whole = num_blocks * _BLOCK_SIZE
    block_shape = (num_blocks, _BLOCK_SIZE)
    blocks = weights[:, :num_whole].unflatten(-1, block_shape)
    sums = []
    # In parts, since a sum in float64 first copies its input.
    for part in blocks.chunk(_NUM_PARTS, dim=1):
        part_sums = part.sum(-1, dtype=torch.float64)
        sums.append(part_sums)
    rest = weights[:, num_whole:]
    last = rest.sum(-1, keepdim=True, dtype=torch.float64)
    sums.append(last)
    return torch.cat(sums, -1)


def _entries_from(
    starts: Tensor,  # [N, 1] int64
    weights: Tensor,  # [N, V]
) -> Tensor:  # [N, block size]
    """Return one block of each row; beyond the vocabulary, where no target is, its last entry."""
    last = weights.shape[-1] - 1
    offsets = torch.arange(_BLOCK_SIZE, device=weights.device)
    columns = starts + offsets
    columns.clamp_(max=last)
    return weights.gather(-1, columns)


def _first_above(
    cumulative: Tensor,  # [N, B] float64, ascending
    targets: Tensor,  # [N, 1] float64, from 0 to below the last sum
) -> Tensor:  # [N, 1] int64
    """Return the first index whose sum is above the target, so one of a weight above 0."""
    last = cumulative.shape[-1] - 1
    indices = torch.searchsorted(cumulative, targets, right=True)
    return indices.clamp_(max=last)  # no sum is above NaN


def _move_inside(
    targets: Tensor,  # [N, 1] float64
    cumulative: Tensor,  # [N, B] float64, ascending
) -> Tensor:  # [N, 1] float64
    """Return targets from 0 to below the last sum, which rounding may have put them outside of."""
    totals = cumulative[:, -1:]
    zeros = torch.zeros_like(totals)
    largest = torch.nextafter(totals, zeros)
    return targets.clamp(zeros, largest)


def _batches(prompts: list[list[int]], max_batch_size: int) -> list[list[int]]:
    """Return which rows are drawn together.

    They are rows of like length: the gap between a short prompt and the longest is computed in
    vain.
    """
    num_rows = len(prompts)
    lengths = [len(tokens) for tokens in prompts]
    order = sorted(range(num_rows), key=lengths.__getitem__)
    batches = []
    for start in range(0, num_rows, max_batch_size):
        stop = start + max_batch_size
        batch = order[start:stop]
        batches.append(batch)
    return batches


def _in_groups(completions: dict[int, Completion], group_size: int) -> list[list[Completion]]:
    """Return the completions of rows 0, 1, ..., ``group_size`` at a time."""
    groups = []
    num_rows = len(completions)
    for start in range(0, num_rows, group_size):
        stop = start + group_size
        group = [completions[row] for row in range(start, stop)]
        groups.append(group)
    return groups


def _uniforms(seeds: Sequence[int], group_size: int, num_steps: int) -> Tensor:
    """Return [num_steps, prompts * group_size] float64 in [0, 1).

    They are made on the CPU so that every device gets the same.
    """
    num_prompts = len(seeds)
    shape = (num_prompts, group_size, num_steps)
    uniforms = torch.empty(shape, dtype=torch.float64)
    generator = torch.Generator()
    for seed, prompt_uniforms in zip(seeds, uniforms, strict=True):
        generator.manual_seed(seed)
        prompt_uniforms.uniform_(generator=generator)
    by_row = uniforms.flatten(0, 1)
    return by_row.t()


def _length_to_stop(tokens: list[int], stops: set[int]) -> int | None:
    """Return the number of tokens up to the first stop token, included; None if there is none."""
    for index, token in enumerate(tokens):
        if token in stops:
            return index + 1
    return None


def _choose_stops(tokenizer: Any, stop_token_ids: list[int] | None) -> set[int]:
    if stop_token_ids is not None:
        return set(stop_token_ids)
    named = getattr(tokenizer, "stop_tokens", None)
    if not named:
        end = getattr(tokenizer, "eos_id", None)
        named = [end]
    stops = {int(token) for token in named if token is not None}
    must = "is not set, and the tokenizer names no stop token"
    require(bool(stops), "stop_token_ids", NO_VALUE, must, "set it; [] for none")
    return stops


def _text_tokens(tokenizer: Any) -> set[int]:
    """Return the ids of the vocabulary that are no special tokens.

    A model's vocabulary may be padded beyond its tokenizer's: such ids do get drawn, and have no
    text.
    """
    vocabulary = vocabulary_of(tokenizer) or {}
    tokens = set(vocabulary.values())
    return tokens - _special_tokens(tokenizer)


def _special_tokens(tokenizer: Any) -> set[int]:
    named = special_ids(tokenizer)
    tokens = {int(token) for token in named.values()}
    for name in ("bos_id", "eos_id", "pad_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            tokens.add(int(token))
    return tokens


def _check_same_shape(name: str, tensor: Tensor, target: Tensor | None) -> None:
    if target is not None and target.shape == tensor.shape:
        return
    replica = "no such parameter" if target is None else list(target.shape)
    raise InputError(
        "policy",
        NO_VALUE,
        f"gives {name} {list(tensor.shape)}, the sampler's replica has {replica}",
        "build both with one builder",
    )
