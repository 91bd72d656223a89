"""Data sets of images: the published ones by name, NumPy arrays, and folders of images by class."""

from parcnn.data.dataset import Dataset, from_arrays
from parcnn.data.folder import from_folder
from parcnn.data.sources import load, names

__all__ = ["Dataset", "from_arrays", "from_folder", "load", "names"]
