"""Make the vendored digits (src/parcnn/data/digits/*.gz) from scikit-learn's copy of them.

    python tools/make_digits.py sklearn/datasets/data/digits.csv.gz [FOLDER]

Writes the same bytes each time for one version of zlib.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parents[1] / "src" / "parcnn" / "data" / "digits"


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write a uint8 array in the IDX format, compressed."""
    header = bytes([0, 0, 0x08, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=9, mtime=0))


def main(csv: Path, folder: Path) -> None:
    """Read the table of scikit-learn and write images and labels into `folder`."""
    table = np.loadtxt(csv, delimiter=",").astype(np.uint8)
    if table.shape != (1797, 65) or table[:, :64].max() != 16 or table[:, 64].max() != 9:
        sys.exit(f"{csv}: not the digits that were expected, 1797 rows of 64 values 0..16 and a label")
    write_idx(folder / "digits-images-idx3-ubyte.gz", np.ascontiguousarray(table[:, :64]).reshape(-1, 8, 8))
    write_idx(folder / "digits-labels-idx1-ubyte.gz", np.ascontiguousarray(table[:, 64]))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else FOLDER)
