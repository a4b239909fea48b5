"""The language model over codes: embeddings, decoder, one head per codebook.

Golden tests: `lm_tiny_text_mono`, `lm_tiny_text_stereo`, `lm_tiny_melody`, `generate_greedy`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from audiocraft.errors import InputError
from audiocraft.generation.cpu_step import CpuStep, supports
from audiocraft.generation.engine import Guidance, ProgressCallback, generate_codes
from audiocraft.generation.sampling import RowNoise, SamplingParams
from audiocraft.modules.codebooks_patterns import DelayedPatternProvider
from audiocraft.modules.conditioners import (
    ConditionFuser,
    ConditioningAttributes,
    ConditioningProvider,
    ConditionTensors,
    nullify,
)
from audiocraft.modules.linear import Linear
from audiocraft.modules.precision import Precision, to_int8, weight_dtype
from audiocraft.modules.transformer import (
    KVCache,
    Memory,
    Norm,
    Transformer,
    TransformerConfig,
    cache_dtype,
)


@dataclass(frozen=True)
class LMOutput:
    """Predictions for each code.

    Attributes:
        logits: [B, K, T, card]; NaN where the pattern has no prediction.
        mask: [B, K, T], true where it has one.
    """

    logits: Tensor
    mask: Tensor


@dataclass
class DecodingState:
    """What a batch of rows carries from step to step.

    Attributes:
        memory: cross-attention keys and values, if the model has cross-attention.
        prefix: conditions that go in front of the first step, until they have been fed.
        positions: most that will be fed, the prefix included.
        on_cpu: whether single steps are those of `CpuStep`.
        cache: self-attention keys and values; made when the first step is fed, if not before.
        step: once a single step has been fed, if it is one of `CpuStep`.
    """

    memory: Memory | None
    prefix: Tensor | None
    positions: int
    on_cpu: bool
    cache: KVCache | None = None
    step: CpuStep | None = None


class LMModel(nn.Module):
    """Transformer over several streams of codes in a delay pattern.

    Args:
        config: shape of the decoder.
        pattern_provider: the delay pattern, which gives K.
        condition_provider: the conditioners.
        fuser: where their output goes.
        card: number of codes of a codebook; the special token is `card`.
        bias_proj: biases in the heads.
        cfg_coef: guidance where a call gives none.
        two_step_cfg: compute the branches of guidance one after the other.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pattern_provider: DelayedPatternProvider,
        condition_provider: ConditioningProvider,
        fuser: ConditionFuser,
        card: int = 1024,
        bias_proj: bool = False,
        cfg_coef: float = 1.0,
        two_step_cfg: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.pattern_provider = pattern_provider
        self.condition_provider = condition_provider
        self.fuser = fuser
        self.card = card
        self.cfg_coef = cfg_coef
        self.two_step_cfg = two_step_cfg
        dim, n_q = config.dim, pattern_provider.n_q
        self.emb = nn.ModuleList(nn.Embedding(card + 1, dim) for _ in range(n_q))
        self.transformer = Transformer(config)
        self.out_norm = Norm(dim)
        self.linears = nn.ModuleList(Linear(dim, card, bias=bias_proj) for _ in range(n_q))
        self.cfg: DictConfig | None = None
        """The resolved `xp.cfg` that the model was built from, if it was."""
        self.precision: Precision = "float32"
        """Of the weights, as `set_precision` left it."""
        self._init_weights()

    def _init_weights(self) -> None:
        """Start of training from nothing: normal, cut at 3 std, std 1 / sqrt(fan in).

        In layer `i` it is divided by sqrt(2 (i + 1)) more. The packed attention projections and
        the conditioners keep torch's uniform default, as measured on the official model.
        """

        def normal(weight: Tensor, depth: int = 0) -> None:
            std = 1 / math.sqrt(weight.shape[1])
            if depth:
                std /= math.sqrt(2 * depth)
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)

        for module in [*self.emb, *self.linears]:
            normal(module.weight)
        for depth, layer in enumerate(self.transformer.layers, start=1):
            for name, weight in layer.named_parameters():
                if name.endswith("in_proj_weight"):
                    bound = 1 / math.sqrt(weight.shape[1])
                    nn.init.uniform_(weight, -bound, bound)
                elif weight.dim() > 1:
                    normal(weight, depth)
                elif name.endswith("bias"):
                    nn.init.zeros_(weight)

    @property
    def n_q(self) -> int:
        """K, the number of codebooks."""
        return self.pattern_provider.n_q

    @property
    def num_codebooks(self) -> int:
        """K, the number of codebooks."""
        return self.n_q

    @property
    def dim(self) -> int:
        """Width of the decoder."""
        return self.config.dim

    @property
    def special_token_id(self) -> int:
        """Token that stands where the pattern holds no code."""
        return self.card

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.out_norm.weight.device

    def set_precision(self, precision: Precision) -> None:
        """Convert the weights for generation; see `audiocraft.modules.precision`.

        Args:
            precision: int8 is for the CPU and final: training, saving and copying need the weights.
        """
        dtype = weight_dtype(precision)
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
        if precision == "int8":
            to_int8(self)
        self.precision = precision

    def encode_conditions(self, conditions: Sequence[ConditioningAttributes]) -> ConditionTensors:
        """Encode a batch of conditions."""
        encoded: ConditionTensors = self.condition_provider(
            self.condition_provider.tokenize(conditions)
        )
        return encoded

    def _embed(self, sequence: Tensor) -> Tensor:
        embedded = [emb(sequence[:, k]) for k, emb in enumerate(self.emb)]
        return torch.stack(embedded).sum(dim=0)

    def _head(self, hidden: Tensor) -> Tensor:
        hidden = self.out_norm(hidden)
        return torch.stack([linear(hidden) for linear in self.linears], dim=1)

    def forward(
        self,
        sequence: Tensor,
        conditions: Sequence[ConditioningAttributes] = (),
        condition_tensors: ConditionTensors | None = None,
    ) -> Tensor:
        """Logits for a sequence that stands in the pattern already.

        Args:
            sequence: tokens [B, K, S].
            conditions: of each item; not together with `condition_tensors`.
            condition_tensors: conditions encoded before.

        Returns:
            Logits [B, K, S, card] for the step after each.
        """
        self._check(sequence)
        if condition_tensors is None:
            condition_tensors = self.encode_conditions(conditions)
        elif conditions:
            raise InputError("Give either conditions or condition_tensors, not both.")
        prefix, source = self.fuser(condition_tensors)
        hidden = self._embed(sequence)
        if prefix is not None:
            hidden = torch.cat([prefix, hidden], dim=1)
        hidden = self.transformer(hidden, source)
        return self._head(hidden[:, -sequence.shape[-1] :])

    def compute_predictions(
        self,
        codes: Tensor,
        conditions: Sequence[ConditioningAttributes],
        condition_tensors: ConditionTensors | None = None,
        keep_only_valid_steps: bool = True,
    ) -> LMOutput:
        """Logits for each code given those before it in the pattern, as training needs them.

        Args:
            codes: [B, K, T].
            conditions: of each item; empty where `condition_tensors` is given.
            condition_tensors: conditions encoded before.
            keep_only_valid_steps: predict only steps up to T, as in training.
        """
        self._check(codes)
        pattern = self.pattern_provider.get_pattern(codes.shape[-1])
        sequence, _, _ = pattern.build_pattern_sequence(
            codes, self.special_token_id, keep_only_valid_steps
        )
        logits = self(sequence, conditions, condition_tensors)
        logits, _, mask = pattern.revert_pattern_logits(
            logits.permute(0, 3, 1, 2), math.nan, keep_only_valid_steps
        )
        return LMOutput(logits.permute(0, 2, 3, 1), mask[None].expand(len(codes), -1, -1))

    def start(self, conditions: Sequence[ConditioningAttributes], max_steps: int) -> DecodingState:
        """A fresh decoding state with one row per item.

        Args:
            conditions: of all rows of all branches.
            max_steps: most steps that will be fed, the prefix not counted.
        """
        prefix, source = self.fuser(self.encode_conditions(conditions))
        memory = None if source is None else self.transformer.project_memory(source)
        positions = max_steps + (0 if prefix is None else prefix.shape[1])
        return DecodingState(memory, prefix, positions, supports(self.transformer, self._heads))

    def advance(self, state: DecodingState, sequence: Tensor) -> Tensor:
        """Feed steps [B, K, S] to a decoding state; logits [B, K, card] after the last."""
        if state.cache is None:
            dtype = cache_dtype(self.device, self._heads[0].weight.dtype)
            state.cache = KVCache(self.config, len(sequence), state.positions, self.device, dtype)
        hidden = self._embed(sequence)
        if state.prefix is not None:
            hidden = torch.cat([state.prefix, hidden], dim=1)
            state.prefix = None
        if state.on_cpu and hidden.shape[1] == 1 and not torch.is_grad_enabled():
            state.step = state.step or CpuStep(
                self.transformer, self.out_norm, self._heads, state.memory, state.cache
            )
            return state.step(hidden)
        hidden = self.transformer(hidden, state.memory, state.cache)
        return self._head(hidden[:, -1:])[:, :, 0]

    @property
    def _heads(self) -> list[Linear]:
        return [cast("Linear", head) for head in self.linears]

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor | None = None,
        conditions: Sequence[ConditioningAttributes] = (),
        num_samples: int | None = None,
        max_gen_len: int = 256,
        use_sampling: bool = True,
        temp: float = 1.0,
        top_k: int = 250,
        top_p: float = 0.0,
        cfg_coef: float | None = None,
        cfg_coef_beta: float | None = None,
        two_step_cfg: bool | None = None,
        remove_prompts: bool = False,
        callback: ProgressCallback | None = None,
        noise: RowNoise | None = None,
    ) -> Tensor:
        """Generate codes.

        Args:
            prompt: codes [B, K, P] to go on from.
            conditions: of each item; none for unconditional generation.
            num_samples: B, where neither prompt nor conditions give it.
            max_gen_len: T, frames of the result, the prompt included.
            use_sampling: false takes the most likely token.
            temp: temperature; 0 takes the most likely token.
            top_k: tokens kept; 0 keeps all.
            top_p: mass kept; above 0 it replaces `top_k`.
            cfg_coef: guidance; the model's own where none is given, and always in two-step mode.
            cfg_coef_beta: weight of the text against the melody (double guidance).
            two_step_cfg: compute and tokenize the branches of guidance apart.
            remove_prompts: leave the prompt out of the result.
            callback: called with (steps done, steps in all).
            noise: random streams of the rows; from torch's global generator if not given.

        Returns:
            Codes [B, K, T], or [B, K, T - P] with `remove_prompts`.

        Raises:
            InputError: sizes that do not agree, or a prompt that leaves nothing to generate.
        """
        sizes = {len(conditions)} if conditions else set()
        if prompt is not None:
            sizes.add(len(prompt))
        if num_samples is not None:
            sizes.add(num_samples)
        if len(sizes) != 1:
            raise InputError(
                "Prompt, conditions and num_samples must give one batch size, "
                f"got {sorted(sizes) or 'none'}."
            )
        rows = sizes.pop()
        if prompt is None:
            prompt = torch.zeros(rows, self.n_q, 0, dtype=torch.long)
        self._check(prompt)
        items = list(conditions) or [ConditioningAttributes() for _ in range(rows)]
        if self.two_step_cfg if two_step_cfg is None else two_step_cfg:
            # Golden test `generate_greedy`, *.two_step_prompt_coef_ignored: the call's coefficient
            # does not count here, and apart from each other the branches are padded differently.
            guidance = Guidance(self.cfg_coef)
            branches = [items, nullify(items)]
        elif all(item.is_null for item in items) or (
            cfg_coef_beta is None and self._coef(cfg_coef) == 1
        ):
            # With nothing to be guided by the branches are equal, and so is their combination;
            # with a coefficient of 1 it is the condition's branch.
            guidance = Guidance(None)
            branches = [items]
        elif cfg_coef_beta is not None:
            guidance = Guidance(self._coef(cfg_coef), cfg_coef_beta)
            branches = [[*items, *nullify(items, keep_wav=True), *nullify(items)]]
        else:
            guidance = Guidance(self._coef(cfg_coef))
            branches = [[*items, *nullify(items)]]
        max_steps = self.pattern_provider.get_pattern(max_gen_len).num_sequence_steps
        codes = generate_codes(
            self,
            [self.start(branch, max_steps) for branch in branches],
            guidance,
            prompt.to(self.device),
            max_gen_len,
            SamplingParams(use_sampling, temp, top_k, top_p),
            noise or RowNoise(None, rows, self.device),
            callback,
        )
        return codes[..., prompt.shape[-1] :] if remove_prompts else codes

    def _coef(self, cfg_coef: float | None) -> float:
        return self.cfg_coef if cfg_coef is None else cfg_coef

    def _check(self, codes: Tensor) -> None:
        if codes.dim() != 3 or codes.shape[1] != self.n_q:  # noqa: PLR2004 - [B, K, T]
            raise InputError(
                f"Codes have the shape {list(codes.shape)}, this model needs [B, {self.n_q}, T]."
            )
