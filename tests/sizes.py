"""Public sizes of real models, for tests that need shapes and no weights."""

from readme_jax.config import ExpertConfig, ModelConfig

LLAMA3_ROPE = dict(rope_theta=500000.0, max_position=8192, norm_eps=1e-5, tied=False)
SMOLLM2 = ModelConfig(
    family="llama", vocab=49152, embed=576, mlp=1536, layer=30, head=9, kv_head=3, head_dim=64, norm_eps=1e-5,
    rope_theta=100000.0, max_position=8192, tied=True,
)  # fmt: skip
MODELS = {
    "llama2-7b": ModelConfig(
        family="llama", vocab=32000, embed=4096, mlp=11008, layer=32, head=32, kv_head=32, head_dim=128, norm_eps=1e-5,
        rope_theta=10000.0, max_position=4096, tied=False,
    ),
    "llama3-8b": ModelConfig(
        family="llama", vocab=128256, embed=4096, mlp=14336, layer=32, head=32, kv_head=8, head_dim=128, **LLAMA3_ROPE
    ),
    "qwen3-32b": ModelConfig(
        family="qwen3", vocab=151936, embed=5120, mlp=25600, layer=64, head=64, kv_head=8, head_dim=128, norm_eps=1e-6,
        rope_theta=1e6, max_position=40960, tied=False, qk_norm=True,
    ),
    "llama3-70b": ModelConfig(
        family="llama", vocab=128256, embed=8192, mlp=28672, layer=80, head=64, kv_head=8, head_dim=128, **LLAMA3_ROPE
    ),
}  # fmt: skip


def half(cfg: ModelConfig, experts: int = 7) -> ExpertConfig:
    """Tied experts of half of the FFN's channels."""
    names = tuple(f"domain{i}" for i in range(experts))
    return ExpertConfig(
        experts=experts, channels=cfg.mlp // 2, storage="tied", names=names, importance="mean_abs", carving="domain"
    )
