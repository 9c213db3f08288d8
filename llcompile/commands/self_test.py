"""A live self-test: does what is converted act here, with the torch and the libraries that are installed?

A tiny model for each family and for each library that can be imported goes the way that a user's model goes: convert,
torch.compile, gradients, a training step, generation. Equality alone would be no answer: a mixer that stays linear has
it. What counts is that noise on the level weights moves the output and that each of them has a gradient.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llcompile.patterns.families import FAMILIES
from llcompile.weights.level_weights import LevelWeights

TOKENS, WIDTH, VOCABULARY = 12, 16, 64
# Channels of a head of a library's function. Fewer are no use on a GPU: with Triton 3.6 on Hopper, products of fp32
# whose tiles have rows of less than 128 bytes are wrong (docs/kernels.md), and a library's own kernels may have such.
HEAD = 32
MOVED, EQUAL = 1e-3, 1e-3  # relative to the largest value
Run = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Place:
    """Where models run: the device, and the inner compiler of the rest of the graph."""

    device: str = "cpu"
    inner: str = "eager"


CPU = Place()


@dataclass(frozen=True)
class Outcome:
    """One row of the self-test.

    `acts` is None where the library's own code cannot run on this machine; `detail` says what was seen.
    """

    name: str
    acts: bool | None
    detail: str


class _Failed(Exception):
    """What a row expected and did not see."""


class _NotHere(Exception):
    """The library's own code does not run on this machine, and so nothing can be said."""


class Loop(nn.Module):
    """A family's recurrence, token by token: a head of one state S in [B, K, V], `forward(x)` with x of [B, T, D]."""

    def __init__(self, decay: str, correction: str) -> None:
        super().__init__()
        self.correction = correction
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.decay = {"none": None, "scalar": nn.Linear(WIDTH, 1), "channel": nn.Linear(WIDTH, WIDTH)}[decay]
        self.beta, self.erase = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """The sequence's outputs, [B, T, V]."""
        query, value = self.query(x), self.value(x)
        key = nn.functional.normalize(self.key(x), dim=-1)
        decay = None if self.decay is None else self.decay(x).sigmoid()  # [B, T, 1] or [B, T, K]
        erase = nn.functional.normalize(self.erase(x), dim=-1)
        beta = self.beta(x).sigmoid()  # [B, T, 1]
        state = x.new_zeros(x.shape[0], WIDTH, WIDTH)
        outputs = []
        for t in range(x.shape[1]):
            old = state
            if decay is not None:
                state = decay[:, t, :, None] * state
            if self.correction == "erase":
                lost = (erase[:, t, :, None] * old).sum(1, keepdim=True)
                state = state - (beta[:, t] * erase[:, t])[..., None] * lost
            new = value[:, t]
            if self.correction == "delta":
                new = beta[:, t] * (new - (key[:, t, :, None] * state).sum(1))
            state = state + key[:, t, :, None] * new[:, None]
            outputs.append((query[:, t, :, None] * state).sum(1))
        return torch.stack(outputs, 1)


def families(place: Place = CPU) -> Iterator[Outcome]:
    """A row for each family, on code of ours that needs no library."""
    for (decay, correction), name in FAMILIES.items():
        yield _row(name, partial(_family, decay, correction, place))


def libraries(place: Place = CPU) -> Iterator[Outcome]:
    """Rows for each library of known functions that can be imported here."""
    for library, rows in LIBRARIES.items():
        if importlib.util.find_spec(library) is not None:
            for name, check in rows.items():
                yield _row(f"{library}: {name}", partial(check, place))


def every(place: Place = CPU) -> Iterator[Outcome]:
    """All rows."""
    yield from families(place)
    yield from libraries(place)


def _row(name: str, check: Callable[[], str]) -> Outcome:
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            return Outcome(name, True, f"acts: {check()}")
    except ImportError as error:
        return Outcome(name, None, f"cannot be imported here: {_first_line(error)}")
    except _NotHere as error:
        return Outcome(name, None, str(error))
    except _Failed as error:
        return Outcome(name, False, str(error))
    except Exception as error:  # whatever a new release of a library brings
        return Outcome(name, False, f"{type(error).__name__}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]


def _family(decay: str, correction: str, place: Place) -> str:
    return _layer(Loop(decay, correction), place)


def _layer(model: nn.Module, place: Place) -> str:
    x = torch.randn(2, TOKENS, WIDTH).to(place.device)
    return _acts(model.to(place.device), (x,), lambda m: m(x), place)


def _acts(model: nn.Module, args: tuple[Any, ...], run: Run, place: Place) -> str:
    """Converts, compiles and trains a model; says what was seen.

    Triton code of a library does not run on a CPU, and what it was converted to does: there is no equality to look at.

    Raises:
        _Failed: something did not act.
        _NotHere: the model itself does not run, and neither does it converted.
    """
    try:
        expected = run(copy.deepcopy(model)).detach()
    except Exception as error:
        try:
            return f"{_converted(model, args, run, place, None)} (its own code does not run here)"
        except Exception:
            raise _NotHere(f"its own code does not run here: {_first_line(error)}") from error
    return _converted(model, args, run, place, expected)


def _converted(model: nn.Module, args: tuple[Any, ...], run: Run, place: Place, expected: Tensor | None) -> str:
    import llcompile

    report = llcompile.convert(model, *args)
    if report.declined or not report.converted:
        reason = report.declined[0].reason if report.declined else "nothing was found"
        raise _Failed(f"declined: {reason}")
    model.compile(backend="loglinear", options={"inner": place.inner})
    before = run(model)
    if expected is not None and (error := _difference(before, expected)) > EQUAL:
        raise _Failed(f"at level weights of 1 the output differs from the model's own by {error:.0e}")
    weights = [p for module in model.modules() if isinstance(module, LevelWeights) for p in module.parameters()]
    _add_noise(weights)
    moved = _difference(run(model), before)
    if moved < MOVED:
        raise _Failed(f"noise on the level weights changes the output by {moved:.0e} only: they have no effect")
    _train(model, run, weights)
    return f"noise changes the output by {moved:.0e}, {len(weights)} of {len(weights)} level weights train"


def _add_noise(weights: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.3 * torch.randn_like(weight))


def _train(model: nn.Module, run: Run, weights: list[nn.Parameter]) -> None:
    """One step of an optimiser over everything, so long that the loss sinks by a hundredth to first order."""
    target = torch.randn_like(run(model).detach())
    loss = (run(model) - target).square().mean()
    loss.backward()
    without = sum(p.grad is None or not bool(p.grad.abs().max() > 0) for p in weights)
    if without:
        raise _Failed(f"{without} of {len(weights)} level weights have no gradient")
    moving = [p for p in model.parameters() if p.grad is not None]
    slope = sum(float(p.grad.square().sum()) for p in moving if p.grad is not None)
    torch.optim.SGD(moving, lr=0.01 * float(loss) / slope).step()
    after = (run(model) - target).square().mean()
    if not bool(after < loss):
        raise _Failed(f"a training step takes the loss from {float(loss):.6f} to {float(after):.6f}")


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


# transformers: one model for each family that it has functions for ---------------------------------------------------

_MODELS: dict[str, dict[str, Any]] = {
    "mamba2": {
        "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8, "num_hidden_layers": 2,
    },
    "qwen3_next": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": HEAD, "linear_value_head_dim": HEAD,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"], "intermediate_size": 32, "mlp_only_layers": [0, 1],
    },
    "kimi_linear": {
        "linear_num_heads": 4, "linear_head_dim": HEAD, "num_attention_heads": 4, "num_key_value_heads": 4,
        "kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16,
        "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "intermediate_size": 32,
        "mlp_layer_types": ["dense", "dense"], "moe_intermediate_size": 16, "num_experts_per_tok": 1,
        "num_local_experts": 2, "n_group": 1, "topk_group": 1,
    },
}  # fmt: skip


def _transformers(model_type: str, place: Place) -> str:
    """A language model: its logits, and then its generation, prompt and new tokens, against the full pass."""
    import transformers

    if model_type not in transformers.CONFIG_MAPPING:
        raise ImportError(f"transformers {transformers.__version__} has no {model_type}")
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    config = transformers.AutoConfig.for_model(model_type, **sizes, **_MODELS[model_type])
    model = transformers.AutoModelForCausalLM.from_config(config).eval().to(place.device)
    ids = torch.randint(3, VOCABULARY, (2, TOKENS)).to(place.device)
    for parameter in model.parameters():  # a config's initial weights are so small that a mixer would not be seen
        nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    seen = _acts(model, (ids,), lambda m: m(ids, use_cache=False).logits, place)
    with torch.no_grad():
        made = model.generate(
            ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        full = model(made.sequences[:, :-1], use_cache=False).logits[:, -1]
    error = _difference(made.logits[-1], full)
    if error > EQUAL:
        raise _Failed(f"the last generated token's logits differ from those of a full pass by {error:.0e}")
    return f"{seen}, generates as a full pass does"


# FLA and mamba_ssm: their functions in a layer of ours ---------------------------------------------------------------


class Calls(nn.Module):
    """A layer around a function of a library: `function(q, k, v, step)` with q of [B, T, H, K], step of [B, T, H]."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.query, self.key, self.value = (nn.Linear(WIDTH, 2 * HEAD) for _ in range(3))
        self.step = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        """The sequence's outputs, [B, T, D], of two heads."""
        query, key, value = (p(x).unflatten(-1, (2, -1)) for p in (self.query, self.key, self.value))
        return self.function(query, nn.functional.normalize(key, dim=-1), value, self.step(x)).flatten(-2)


def _fla_gated_delta(place: Place) -> str:
    function = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule

    def mix(query: Tensor, key: Tensor, value: Tensor, step: Tensor) -> Tensor:
        return function(query, key, value, g=nn.functional.logsigmoid(step), beta=step.sigmoid())[0]

    return _layer(Calls(mix), place)


def _fla_simple_gla(place: Place) -> str:
    function = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla

    def mix(query: Tensor, key: Tensor, value: Tensor, step: Tensor) -> Tensor:
        return function(query, key, value, g=nn.functional.logsigmoid(step))[0]

    return _layer(Calls(mix), place)


def _mamba_ssm(place: Place) -> str:
    function = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined

    def mix(query: Tensor, key: Tensor, value: Tensor, step: Tensor) -> Tensor:
        return function(value, nn.functional.softplus(step), -step.new_ones(2), key, query, chunk_size=16)

    return _layer(Calls(mix), place)


LIBRARIES: dict[str, dict[str, Callable[[Place], str]]] = {
    "transformers": {
        "Mamba-2 (SSD)": partial(_transformers, "mamba2"),
        "Gated DeltaNet": partial(_transformers, "qwen3_next"),
        "Kimi Delta Attention": partial(_transformers, "kimi_linear"),
    },
    "fla": {"scalar-decay linear attention": _fla_simple_gla, "Gated DeltaNet": _fla_gated_delta},
    "mamba_ssm": {"Mamba-2 (SSD)": _mamba_ssm},
}
