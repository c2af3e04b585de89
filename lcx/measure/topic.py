"""Chapter 4: four models on the topic task, each trained from three seeds, with 0 to 64 documents in the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import kept, measurement

MODELS = ("topic-plain", "topic-d1", "topic-d8", "topic-d2-32")
SEEDS = (0, 1, 2)
IN_MEMORY = (0, 1, 2, 4, 8, 16, 32, 64)


def trained(name: str, seed: int) -> Path:
    """The folder of a model trained from `seed`: of the zoo for seed 0, else of the cache, trained now if it is not there."""
    from .. import zoo
    from ..zoo.training import work_dir

    if seed == 0:
        folder = zoo.folder(name)
    else:  # named after the recipe, so that a changed recipe is trained anew
        recipe = zoo.recipe(name)
        folder = kept("topic").parent / work_dir(recipe, seed, recipe.steps).name
        if not (folder / "card.json").is_file():
            zoo.train(name, out=folder, seed=seed)
    zoo.check_files(folder)
    return folder


@measurement("topic-distraction", model=None, seed=0)
def distraction() -> dict[str, Any]:
    """Attention and loss of the four topic models, from three seeds each, by the number of documents in the memory."""
    import json

    from ..models import load
    from ..zoo.recipes.topic import measure

    rows, made = [], []
    for name in MODELS:
        for seed in SEEDS:
            folder = trained(name, seed)
            card = json.loads((folder / "card.json").read_text())
            made.append({"model": name, "seed": seed, "command": card["made_by"]["command"]})
            made[-1]["sha256"] = card["sha256"]["model.safetensors"]
            model, _ = load(str(folder), device="cpu")
            for d in IN_MEMORY:
                figures = {k: round(v, 5) for k, v in measure(model, d).items()}
                rows.append({"model": name, "seed": seed, "d": d, **figures})
    return {
        "models": list(MODELS),
        "seeds": list(SEEDS),
        "in_memory": list(IN_MEMORY),
        "trained": made,
        "rows": rows,
    }
