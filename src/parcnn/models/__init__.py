"""Networks, each written as a user would write it; one a file."""

from parcnn.models.cifarnet import CifarNet
from parcnn.models.lenet5 import LeNet5
from parcnn.models.registry import create, names

__all__ = ["CifarNet", "LeNet5", "create", "names"]
