"""Write the first and the last image panel of a run's TensorBoard events as PNG files.

python benchmarks/panel_pictures.py outputs/tiny docs/panel
"""

from __future__ import annotations

import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def main(run: str, target: str) -> None:
    """``target``_before.png and ``target``_after.png."""
    events = EventAccumulator(run, size_guidance={"images": 0}).Reload()
    tags = events.Tags()["images"]
    if not tags:
        raise SystemExit(f"error: no image panels in {run}")
    panels = events.Images(tags[0])
    for name, panel in (("before", panels[0]), ("after", panels[-1])):
        path = Path(f"{target}_{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(panel.encoded_image_string)
        print(f"{path}: {tags[0]} at step {panel.step}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
