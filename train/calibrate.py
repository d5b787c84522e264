"""Activation statistics of the FFN channels by domain: one forward pass over the calibration records.

readme-jax calibrate --model runs/dense --data runs/data --out runs/statistics

In: a dense model folder and packed text (`data`). Out: statistics.safetensors. Interrupted, it goes on where it was.
"""

import json

import jax
import numpy as np
from safetensors.numpy import load_file, save

from readme_jax import artifacts, cli, hf, placement
from readme_jax.calibrate import Accumulator, CalibrateConfig, make_statistics
from readme_jax.carve import Statistics, save_statistics
from readme_jax.config import CheckpointError, DataError, require
from readme_jax.data import eval_batches, open_records
from readme_jax.metrics import Stopwatch, peak_memory, progress
from readme_jax.models import backbone
from readme_jax.sharding import batch_devices, put, spec, use_mesh
from readme_jax.statistics import cut_windows

SAVE_EVERY = 20.0  # seconds between two saves of unfinished sums


def main(argv: list[str] | None = None) -> None:
    """Calibrate once; a finished folder of the same config and inputs is left as it is."""
    config: CalibrateConfig = cli.parse(CalibrateConfig, argv, __doc__ or "", prog="readme-jax calibrate")
    parents = {"model": config.model, "data": config.data}
    if artifacts.finished(config.out, "calibrate", config, parents):
        print(f"statistics: {config.out} (already there)")
        return
    cfg, experts, _ = hf.read_config(config.model)
    require(experts is None, f"model={config.model} is carved already; calibrate the dense model", CheckpointError)
    records = open_records(config.data, "calibration", cfg.vocab)
    for name, own in records.items():
        require(len(own) > 0, f"domain {name}: no calibration records", DataError)
    with use_mesh(config.mesh), artifacts.building(config.out, "calibrate", config, parents) as work:
        require(config.batch % batch_devices() == 0, f"batch={config.batch} must be a multiple of {batch_devices()}")
        params, _, _ = placement.load_sharded(config.model, backbone.param_specs(cfg), dtype=np.float32)
        statistics = make_statistics(cfg, config.dtype, config.window)
        sums = {name: Accumulator(cfg.layer, cfg.mlp) for name in records}
        mark = work.path / "unfinished.safetensors"
        if mark.is_file():
            saved = load_file(mark)
            for name, own in sums.items():
                own.restore({key.split("/", 1)[1]: v for key, v in saved.items() if key.split("/", 1)[0] == name})
        kept, row = None, 0
        if config.window:
            texts = {name: (own.ids, own.segments) for name, own in records.items()}
            kept = cut_windows(work.path, texts, config.window, (cfg.layer, cfg.mlp))
        seen = sum(s.tokens for s in sums.values())
        total = sum(int(np.count_nonzero(own.segments)) for own in records.values())
        with progress(total, "calibrate", initial=seen) as bar:
            last = Stopwatch()
            for name, own in records.items():
                for index, batch in enumerate(eval_batches({name: own}, config.batch)):
                    counts_B = -(-np.count_nonzero(batch["segments"], axis=1) // max(config.window, 1))
                    first, row = row, row + int(counts_B.sum())
                    if index < sums[name].batches:
                        continue
                    placed = (put(batch[key], spec("batch", "seq")) for key in ("ids", "segments"))
                    before, watch = sums[name].tokens, Stopwatch()
                    found = jax.device_get(statistics(params, *placed))
                    if kept is not None:
                        rows = [found["windows"][:, b, :count] for b, count in enumerate(counts_B)]
                        kept.share_WLF[first:row] = np.concatenate(rows, axis=1).swapaxes(0, 1)
                    sums[name].add(found, watch.seconds)
                    bar.update(sums[name].tokens - before)
                    if last.seconds > SAVE_EVERY:
                        if kept is not None:
                            kept.share_WLF.flush()  # type: ignore
                        _save({f"{n}/{k}": v for n, s in sums.items() for k, v in s.state().items()}, mark)
                        work.kept = True
                        last = Stopwatch()
        mark.unlink(missing_ok=True)
        if kept is not None:
            kept.share_WLF.flush()  # type: ignore
            work.info |= {"windows": len(kept.share_WLF), "window": config.window}
        means = [s.means() for s in sums.values()]
        arrays = {f"{key}_MLF": np.stack([m[key] for m in means]) for key in ("abs", "square", "mean", "share")}
        tokens_M = np.array([s.tokens for s in sums.values()], np.int64)
        save_statistics(Statistics(names=tuple(records), **arrays, tokens_M=tokens_M), work.path)
        work.info |= {
            "seconds": (seconds := sum(s.seconds for s in sums.values())),  # over all starts
            "tokens": int(tokens_M.sum()),
            "tokens_per_s": int(tokens_M.sum()) / seconds,
            **peak_memory(),
        }
    print(f"statistics: {config.out} {json.dumps(dict(zip(records, tokens_M.tolist())))} tokens")


def _save(state: dict[str, np.ndarray], path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(save(state))
    temporary.replace(path)


if __name__ == "__main__":
    cli.run(main)
