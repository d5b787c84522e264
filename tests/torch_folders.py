"""Tiny random model folders whose dense weights transformers made, and what PyTorch computes with them."""

import json

import numpy as np
from safetensors.numpy import load_file, save_file

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
EXTRA = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}
V, D, F, L, E, R, LR, HEADS, THETA, EPS = 97, 32, 48, 2, 3, 32, 2, 4, 5000.0, 1e-6
BLOCK = ("q", "k", "v", "o", "in", "out")


def router_tensors(rng, experts):
    """Tensors of a random router under their names on disk, and the same as the package's stacked dict."""
    make = lambda *shape: rng.normal(0, 0.3, shape).astype(np.float32)  # noqa: E731
    ours = {
        "embedding": make(V, R), "norm": 1 + make(R), "head": make(experts, R), "b_head": make(experts),
        "layers": {"attn_norm": 1 + make(LR, R), "mlp_norm": 1 + make(LR, R)},
    }  # fmt: skip
    for name in BLOCK:
        ours["layers"] |= {f"w_{name}": make(LR, R, R), f"b_{name}": make(LR, R)}
    disk = {"embedding.weight": ours["embedding"], "norm.weight": ours["norm"]}
    disk |= {"head.weight": ours["head"], "head.bias": ours["b_head"]}
    for i in range(LR):
        for name in ("attn_norm", "mlp_norm"):
            disk[f"layers.{i}.{name}.weight"] = ours["layers"][name][i]
        for name in BLOCK:
            disk[f"layers.{i}.{name}.weight"] = ours["layers"][f"w_{name}"][i]
            disk[f"layers.{i}.{name}.bias"] = ours["layers"][f"b_{name}"][i]
    return {f"readme.router.{name}": array for name, array in disk.items()}, ours


def make_folder(folder, family="llama", *, storage="tied", experts=E, routed=True):
    """A tiny random model folder, its dense weights made by transformers. Returns (table [L, E, C], router dict)."""
    import torch
    import transformers

    rng = np.random.default_rng(FAMILIES.index(family))
    torch.manual_seed(1)
    C = F // 2 if storage == "tied" else F // experts
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": THETA}, **EXTRA[family],
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if storage == "separate":
        rows = np.arange(F, dtype=np.int32).reshape(experts, C)
        table = np.tile(rows, (L, 1, 1))
    else:
        table = np.stack([[np.sort(rng.permutation(F)[:C]) for _ in range(experts)] for _ in range(L)]).astype(np.int32)
    tensors, router = router_tensors(rng, experts) if routed else ({}, None)
    weights = folder / "model.safetensors"
    save_file(load_file(weights) | tensors | {"readme.experts": table}, weights, metadata={"format": "pt"})
    data = json.loads((folder / "config.json").read_text())
    data["readme"] = {
        "experts": {
            "experts": experts, "channels": C, "storage": storage, "names": [f"d{i}" for i in range(experts)],
            "importance": "energy", "carving": "domain" if experts > 1 else "static",
        },
        "router": {"width": R, "heads": HEADS, "layers": LR, "norm_eps": EPS} if routed else None,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(data))
    return table, router


def load_ours(folder, **options):
    """The exported folder through the shipped classes, without transformers' code cache."""
    import torch

    from readme_jax.hf_code import modeling_readme

    family = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(modeling_readme, family).from_pretrained(folder, dtype=options.pop("dtype", torch.float32)).eval()


def dense_logits(folder, family, ids, table=None, expert_BT=None):
    """transformers' own dense model; with a table the input of every down_proj is masked by a hook, in NumPy."""
    import torch
    import transformers

    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    model = getattr(transformers, f"{name}ForCausalLM").from_pretrained(folder, dtype=torch.float32).eval()
    if table is not None:
        for layer, experts_EC in zip(model.model.layers, table):
            member_BTF = np.stack([[np.isin(np.arange(F), experts_EC[e]) for e in row] for row in expert_BT])
            mask = torch.from_numpy(member_BTF.astype(np.float32))
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,))
    with torch.no_grad():
        return model(ids, use_cache=False).logits.numpy()


def token_ids(seed=0, batch=2, length=70):
    import torch

    return torch.from_numpy(np.random.default_rng(seed).integers(3, V, (batch, length)))
