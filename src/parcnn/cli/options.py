"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Device = Annotated[str, typer.Option(help="auto (the GPU where there is one), cpu or cuda.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads; 1 is the sequential implementation. [default: all]")
]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder that holds data sets, looked in before $PARCNN_DATA and the cache.")
]
Size = Annotated[
    tuple[int, int] | None, typer.Option(help="Height and width that the image files of a folder are resized to.")
]
