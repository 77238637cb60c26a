"""What the test of Liger runs in a process of its own, because Triton reads TRITON_INTERPRET when it is imported, and
Liger puts its classes into transformers' modules for good.

A step of DPO on one short pair, with Liger's kernels and without: prints as JSON how far the two are apart, and what
was replaced.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]


def complete_the_interpreter() -> None:
    """Triton's interpreter knows no numbers that are no integers among a kernel's arguments, and no ``rsqrt``."""
    original = interpreter._implicit_cvt

    def converted(argument: Any) -> Any:
        if not isinstance(argument, float):
            return original(argument)
        return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)

    def rsqrt(x: Any) -> Any:
        return tl.tensor(interpreter.TensorHandle(x.handle.data ** np.float32(-0.5), x.handle.dtype), x.type)

    interpreter._implicit_cvt = converted
    importlib.import_module("liger_kernel.ops.rms_norm").rsqrt = rsqrt


def forwards(model: Any) -> dict[str, str]:
    """Module -> the forward that was put in place of its own."""
    replaced = ((name, vars(module).get("forward")) for name, module in model.named_modules())
    return {name: forward.__func__.__qualname__ for name, forward in replaced if forward is not None}


def main(folder: str) -> dict[str, Any]:
    from datasets import Dataset
    from short_runs import relative_difference, trainer, weights
    from tiny_models import tiny_model

    row = {"prompt": ["baba kaka"], "chosen": [" baba lala"], "rejected": [" dada"]}

    def run(**options: Any) -> Any:
        small = tiny_model(seed=1, num_hidden_layers=1)
        options = {"optim": "sgd", "learning_rate": 1.0, "rows": Dataset.from_dict(row), **options}
        made = trainer(Path(folder), model=small, max_steps=1, **options)
        made.train()
        return made

    plain, start = run(), weights(tiny_model(seed=1, num_hidden_layers=1))
    complete_the_interpreter()
    liger = run(use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": True})
    of_steps = relative_difference(weights(liger.model) - start, weights(plain.model) - start)
    return {
        "layout": liger.layout.layout,
        "config": liger.args.liger_kernel_config,
        "difference": of_steps,
        "policy": forwards(liger.model),
        "reference": forwards(liger.ref_model),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
