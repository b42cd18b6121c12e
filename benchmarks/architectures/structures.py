"""Rows for what models do with their layers: in place, shared, called again, functional, frozen, parametrized."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from .base import EXACT, MISSES, OUTSIDE, UNUSED, Architecture, Claim, uncovered
from .layers import tokens, vectors


class Named(nn.Module):
    """Submodules by name, and a forward pass made of them."""

    def __init__(self, run: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def linear(n_in: int = 4, n_out: int = 4, bias: bool = True) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias)


def named(run: Callable[..., Any], n_out: int = 3, **modules: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A builder: modules a, b, ... as given, and a head c."""
    return lambda: Named(run, **{name: make() for name, make in modules.items()}, c=linear(4, n_out))


# In place.


def added_in_place(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h += m.b(x).tanh()
    return m.c(h.relu_())


def slice_in_place(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h[:, :2] *= 3
    h[:, 2:].tanh_()
    return m.c(h)


def everything_in_place(m: Any, x: Tensor) -> Tensor:
    h = F.silu(m.a(x).mul_(2), inplace=True)
    h = m.b(h).add_(x).sub_(1)
    h[:, 0].zero_()
    return m.c(F.leaky_relu_(h, 0.1)).div_(2).clone()


# Shared, called again, functional.


def unrolled(m: Any, x: Tensor) -> Tensor:
    h = torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        h = (m.a(x[:, t]) + m.b(h)).tanh()
    return m.c(h)


def tied_linears() -> nn.Module:
    model: Any = Named(lambda m, x: m.c(m.b(m.a(x).tanh())), a=linear(), b=linear(), c=linear(4, 3))
    model.b.weight = model.a.weight
    return model


def tied_embedding() -> nn.Module:
    """An embedding whose weight is the head's."""
    model: Any = Named(
        lambda m, x: m.head(m.a(m.emb(x)).tanh()), emb=nn.Embedding(5, 4), a=linear(), head=linear(4, 5, False)
    )
    model.head.weight = model.emb.weight
    return model


# Attention.


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def attention_linears(m: Any, x: Tensor) -> Tensor:
    return m.c(m.out(attend(m.q(x), m.k(x), m.v(x), 2)))


def grouped_queries(m: Any, x: Tensor) -> Tensor:
    """Two heads of queries share one of keys and values."""
    k, v = (t.repeat(1, 1, 2) for t in (m.k(x), m.v(x)))
    return m.c(x + m.out(attend(m.q(x), k, v, 2)))


def multihead(**options: Any) -> Callable[[], nn.Module]:
    return named(
        lambda m, x: m.c(m.attention(x, x, x, need_weights=False)[0]),
        attention=partial(nn.MultiheadAttention, 4, 2, batch_first=True, **options),
    )


def cross_attention(m: Any, x: Tensor) -> Tensor:
    """Queries of one sequence, keys and values of another, longer one."""
    return m.c(m.attention(x[:, :2], x, x)[0])


def encoder() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), linear(4, 3))


def pre_norm_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, norm_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), linear(4, 3))


# Routing, containers, frozen parts, reparametrisation.


class Experts(nn.Module):
    """Three experts for tokens, chosen by the sign of a feature; the last never is. Scores by token, or their mean."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.pooled = pooled
        self.router, self.head = linear(4, 2), linear(4, 3)
        self.experts = nn.ModuleList(nn.Sequential(linear(), nn.GELU(), linear()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        gate, mixed = self.router(x).softmax(-1), torch.zeros_like(x)
        for i, chosen in enumerate((x[..., 0] > 0, x[..., 0] <= 0)):
            mixed[chosen] = gate[chosen][:, i : i + 1] * self.experts[i](x[chosen])
        scores = self.head(x + mixed)
        return scores.mean(1) if self.pooled else scores


def routed(B: int) -> Tensor:
    """Two tokens a sample, one for each of the first two experts."""
    x = torch.randn(B, 2, 4)
    x[..., 0] = torch.tensor([1.0, -1.0])
    return x


def routed_unevenly(B: int) -> Tensor:
    """Whole samples go to one expert, both tokens of each."""
    x = routed(B)
    x[..., 0] = 1.0 - 2.0 * (torch.arange(2 * B).view(B, 2) >= B)
    return x


class Containers(nn.Module):
    """Layers in lists and dicts within each other, called out of order; bare parameters in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleDict(
            {"two": nn.ModuleList([linear(), linear()]), "one": nn.ModuleDict({"a": linear()})}
        )
        self.scales = nn.ParameterList([torch.ones(4), torch.ones(3)])
        self.head = nn.Sequential(nn.Sequential(linear(4, 3)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks["one"]["a"](x).tanh()
        for layer in reversed(self.blocks["two"]):
            h = h + layer(h).tanh()
        return self.head(h * self.scales[0]) * self.scales[1]


class Scaled(nn.Module):
    """A learned temperature without dimensions, and a bias of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.zeros(3))
        self.a, self.c = linear(), linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.c(self.a(x).tanh()) + self.shift


def lora() -> nn.Module:
    """An adapter over a frozen base, past its start, at which the second matrix is zero."""
    model: Any = named(
        lambda m, x: m.c((m.base(x) + m.up(m.low(x))).tanh()),
        base=linear, low=lambda: linear(4, 2, False), up=lambda: linear(2, 4, False),
    )()  # fmt: skip
    model.base.requires_grad_(False)
    return model


def lora_at_its_start() -> nn.Module:
    """The second matrix is zero, so that the first one receives a gradient of zeros."""
    model: Any = lora()
    nn.init.zeros_(model.up.weight)
    return model


def half_frozen() -> nn.Module:
    model: Any = nn.Sequential(linear(), nn.Tanh(), linear(), nn.Tanh(), linear(4, 3))
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    model[4].weight.requires_grad_(False)
    return model


def unfreeze(model: nn.Module, optimizer: Any) -> None:
    """Everything, from the second step on."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    model.requires_grad_(True)
    optimizer.add_param_group({"params": frozen})


def frozen_bias() -> nn.Module:
    model: Any = nn.Sequential(linear(), nn.Tanh(), linear(4, 3))
    model[0].bias.requires_grad_(False)
    return model


def hooked() -> nn.Module:
    """Somebody else's hook replaces a layer's output."""
    model = nn.Sequential(linear(), nn.Tanh(), linear(4, 3))
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    return model


class Symmetric(nn.Module):
    def forward(self, W: Tensor) -> Tensor:
        return W.triu() + W.triu(1).mT


def compiled() -> Any:
    return torch.compile(nn.Sequential(linear(), nn.Tanh(), linear(4, 3)), backend="aot_eager")


def parametrized(how: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(how(linear()), nn.Tanh(), linear(4, 3))


def symmetric(module: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(module, "weight", Symmetric())


ORIGINAL = {"0.parametrizations.*": uncovered("no factors for")}
ORIGINAL_BIAS = {**ORIGINAL, "0.bias": EXACT}
# What BackPACK's module hooks do not carry.
IN_PLACE = "modified inplace"
AGAIN = {"a.*": MISSES}
PROJECTIONS = {"*att*.*proj*": OUTSIDE}

ROWS = [
    Architecture(
        "inplace_relu",
        lambda: nn.Sequential(linear(), nn.ReLU(inplace=True), linear(4, 3)),
        vectors(4),
        backpack=IN_PLACE,
    ),
    Architecture("inplace_addition", named(added_in_place, a=linear, b=linear), vectors(4), backpack=IN_PLACE),
    Architecture("inplace_slice", named(slice_in_place, a=linear), vectors(4), backpack=IN_PLACE),
    Architecture("inplace_everything", named(everything_in_place, a=linear, b=linear), vectors(4), backpack=IN_PLACE),
    Architecture("residual", named(lambda m, x: m.c(x + m.a(x).tanh()), a=linear), vectors(4)),
    Architecture(
        "module_called_twice", named(lambda m, x: m.c(m.a(m.a(x).tanh())), a=linear), vectors(4), backpack=AGAIN
    ),
    Architecture(
        "module_called_thrice",
        named(lambda m, x: m.c(m.a(m.a(m.a(x).tanh()).tanh())), a=linear),
        vectors(4),
        backpack=AGAIN,
    ),
    Architecture("recurrent_linears", named(unrolled, a=linear, b=linear), vectors(3, 4), backpack={"[ab].*": MISSES}),
    Architecture(
        "keyword_call",
        named(lambda m, x: m.c(input=m.a(input=x).tanh()), a=linear),
        vectors(4),
        backpack={"*": OUTSIDE},
    ),
    Architecture(
        "output_of_two_layers",
        lambda: Named(lambda m, x: m.b(x) * m.a(x).softmax(-1), a=linear(4, 3), b=linear(4, 3)),
        vectors(4),
    ),
    Architecture(
        "output_broadcast",
        lambda: Named(lambda m, x: m.a(x) * torch.arange(3.0, dtype=x.dtype), a=linear(4, 1)),
        vectors(4),
    ),
    Architecture("someone_elses_hook", hooked, vectors(4), backpack={"0.*": MISSES}),
    Architecture(
        "activation_ckpt",
        named(
            lambda m, x: m.c(checkpoint(lambda h: m.b(m.a(h).tanh()).tanh(), x, use_reentrant=False)),
            a=linear,
            b=linear,
        ),
        vectors(4),
    ),
    Architecture(
        "activation_ckpt_reentrant",
        named(
            lambda m, x: m.c(m.b(x) + checkpoint(lambda h: m.a(h).tanh(), m.b(x), use_reentrant=True)),
            a=linear,
            b=linear,
        ),
        vectors(4),
        {"a.*": OUTSIDE},
        brute=False,
    ),
    Architecture(
        "torch_compile",
        compiled,
        vectors(4),
    ),
    Architecture(
        "bf16_autocast",
        lambda: nn.Sequential(linear(), nn.Tanh(), linear(4, 3)),
        vectors(4),
        scope=lambda: torch.autocast("cpu", torch.bfloat16),
        dtype=torch.float32,
        brute=False,
    ),
    Architecture(
        "bf16_weights",
        lambda: nn.Sequential(linear(), nn.Tanh(), linear(4, 3)),
        vectors(4),
        dtype=torch.bfloat16,
        brute=False,
    ),
    Architecture(
        "tied_linears",
        tied_linears,
        vectors(4),
        {name: uncovered("a weight is shared between a, b") for name in ("a.*", "b.*")},
    ),
    Architecture(
        "tied_embedding", tied_embedding, tokens(3), {"emb.weight": uncovered("a weight is shared between emb, head")}
    ),
    Architecture(
        "functional_weight",
        named(lambda m, x: m.c(F.linear(x, m.a.weight, m.a.bias).tanh()), a=linear),
        vectors(4),
        {"a.*": OUTSIDE},
    ),
    Architecture(
        "functional_beside_call",
        named(lambda m, x: m.c(m.a(x) + F.linear(x, m.a.weight)), a=linear),
        vectors(4),
        {"a.*": MISSES},
    ),
    Architecture(
        "functional_embedding",
        lambda: Named(lambda m, x: F.linear(m.emb(x).mean(1), m.emb.weight), emb=nn.Embedding(5, 4)),
        tokens(3),
        {"emb.*": MISSES},
    ),
    Architecture(
        "embedding_scaled_by_frequency",
        lambda: nn.Sequential(nn.Embedding(5, 4, scale_grad_by_freq=True), nn.Flatten(), linear(12, 3)),
        lambda B: torch.zeros(B, 3, dtype=torch.long),
        {"0.*": MISSES},
    ),
    Architecture(
        "attention_linears", named(attention_linears, q=linear, k=linear, v=linear, out=linear), vectors(3, 4)
    ),
    Architecture(
        "gqa_attention",
        named(grouped_queries, q=linear, k=lambda: linear(4, 2), v=lambda: linear(4, 2), out=linear),
        vectors(3, 4),
    ),
    Architecture("multihead_attention", multihead(), vectors(3, 4), backpack=PROJECTIONS),
    Architecture("multihead_no_bias", multihead(bias=False), vectors(3, 4), backpack=PROJECTIONS),
    Architecture(
        "multihead_cross",
        named(cross_attention, attention=partial(nn.MultiheadAttention, 4, 2, batch_first=True)),
        vectors(3, 4),
        backpack=PROJECTIONS,
    ),
    Architecture("transformer_layer", encoder, vectors(3, 4), backpack=PROJECTIONS),
    Architecture("transformer_stack", pre_norm_encoder, vectors(3, 4), backpack=PROJECTIONS),
    Architecture(
        "transformer_decoder",
        named(
            lambda m, x: m.c(m.layer(x[:, 1:], x)),
            layer=partial(nn.TransformerDecoderLayer, 4, 2, 6, dropout=0.0, batch_first=True),
        ),
        vectors(3, 4),
        backpack=PROJECTIONS,
    ),
    Architecture("mixture_of_experts", Experts, routed, {"experts.2.*": UNUSED}),
    Architecture(
        "mixture_of_experts_uneven",
        partial(Experts, pooled=True),
        routed_unevenly,
        {"experts.2.*": UNUSED, "experts.*": Claim("approximation", "as many rows as samples count as samples")},
    ),
    Architecture("nested_containers", Containers, vectors(4), {"scales.*": uncovered("no factors for ParameterList")}),
    Architecture("zero_dim_parameter", Scaled, vectors(4), {"s*": uncovered("no factors for Scaled")}),
    Architecture(
        "unfrozen_later",
        half_frozen,
        vectors(4),
        dict.fromkeys(("0.*", "2.bias", "4.weight"), Claim("fallback", "added after the optimizer was built")),
        between=unfreeze,
    ),
    Architecture("frozen_bias", frozen_bias, vectors(4)),
    Architecture("half_frozen", half_frozen, vectors(4)),
    Architecture("lora_frozen_base", lora, vectors(4)),
    Architecture("lora_at_its_start", lora_at_its_start, vectors(4)),
    Architecture("weight_norm", parametrized(parametrizations.weight_norm), vectors(4), ORIGINAL_BIAS),
    Architecture("spectral_norm", parametrized(parametrizations.spectral_norm), vectors(4), ORIGINAL_BIAS),
    Architecture("orthogonal", parametrized(parametrizations.orthogonal), vectors(4), ORIGINAL_BIAS),
    Architecture("symmetric", parametrized(symmetric), vectors(4), ORIGINAL_BIAS),
]
