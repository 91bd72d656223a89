"""How a convolution becomes a matrix product (im2col; Chellapilla et al. 2006), cut into blocks that stay in cache.

    Y (M, K) = columns (M, R*S*C) @ filters (K, R*S*C)^T        a row of `columns` is what one filter position sees

* *Pool as filters*: with a 2x2 pool a row sees the (R+1, S+1) pixels that the four outputs of a pool window need, and four
  shifted copies of the filters give these outputs, the pool's candidates, side by side. For few filters that is faster: the
  copies read 4*R*S elements a window otherwise, and the product is four times as wide. (The shifted filters hold zeros, which
  make NaN of an infinity that they meet: what is not finite is computed with the pool `apart`.)
* *Columns outermost*: with few channels the copies run along an image's row rather than over a pixel's channels; the matrix of
  columns is then stored transposed. So are, for the same reason and apart from it, the products of few filters.
* *Plain*: for 1x1 filters of stride 1, and for filters that cover the image (Linear layers), the image is the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod

import numpy as np

from parcnn.cpu.workers import Scratch, Shape, together
from parcnn.ops.conv import ConvGeometry

# Bytes of one block's columns and products: half of an L2 cache of 2 MiB. (LeNet-5's convolutions forward and backward, us an
# image on one thread of a Xeon of 2.3 GHz: 109 at 256 KiB, 91 at 512 KiB, 82 at 1 MiB, 84 at 2 MiB.)
BLOCK_BYTES = 1024 * 1024
# Most blocks that a thread takes in one go where several work (workers.together).
MOST_BLOCKS = 5
# Copying an element into the columns takes as long as this many operations of the product (measured: 0.4 ns, 120 GFLOP/s).
FLOPS_A_COPY = 50
# Up to so many channels the columns are outermost (measured: 3.3 against 6.8 us an image for LeNet-5's first layer).
FEW_CHANNELS = 4
# Up to so many filters the products are stored transposed, so that the epilogue's loops run along pixels.
FEW_FILTERS = 8


@dataclass(frozen=True)
class Block:
    """Some images whole, or some output rows of one image."""

    images: slice
    rows: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Images and output rows."""
        return self.images.stop - self.images.start, self.rows.stop - self.rows.start


@dataclass(frozen=True, eq=False)
class Lowering:
    """A convolution of images (N,H,W,C) with filters (K,R,S,C), as products of matrices."""

    geometry: ConvGeometry
    image: Shape
    filters: Shape
    itemsize: int
    keeps_pool_apart: bool = False

    def __post_init__(self) -> None:
        """Derive, once, what every block asks for."""
        (_, h, w, c), (k, r, s, _) = self.image, self.filters
        g = self.geometry
        p, q = g.pooled_hw(h, w, r, s)
        unit = g.stride == (1, 1) and g.dilation == (1, 1)
        padded = any(g.pad)
        pool_as_filters = False
        if g.pool and unit and not self.keeps_pool_apart:
            extra_flops = 8 * k * ((r + 1) * (s + 1) - r * s)
            pool_as_filters = extra_flops < FLOPS_A_COPY * (4 * r * s - (r + 1) * (s + 1))
        step = 2 if pool_as_filters else 1
        covers = (r, s) == (h, w) and g.dilation == (1, 1)
        plain = not g.pool and not padded and ((r == s == 1 and g.stride == (1, 1)) or covers)
        own = {
            "p": p,
            "q": q,
            "padded": padded,
            "pool_as_filters": pool_as_filters,
            "plain": plain,
            "columns_outermost": c <= FEW_CHANNELS and not plain,
            "products_transposed": k <= FEW_FILTERS and not plain,
            # The filters of the product, and the pixels between its windows.
            "r": r + step - 1,
            "s": s + step - 1,
            "stride": (g.stride[0] * step, g.stride[1] * step),
            # Windows an output row and column: a 2x2 pool whose candidates are no filters has two.
            "windows_per_output": 2 if g.pool and not pool_as_filters else 1,
            "outputs": 4 * k if pool_as_filters else k,
        }
        for name, value in own.items():
            object.__setattr__(self, name, value)

    p: int = 0
    q: int = 0
    padded: bool = False
    pool_as_filters: bool = False
    plain: bool = False
    columns_outermost: bool = False
    products_transposed: bool = False
    r: int = 0
    s: int = 0
    stride: tuple[int, int] = (1, 1)
    windows_per_output: int = 1
    outputs: int = 0

    @property
    def apart(self) -> Lowering:
        """The same without the pool as filters: no product has terms that are not the convolution's."""
        return replace(self, keeps_pool_apart=True)

    @property
    def depth(self) -> int:
        """Length of the product's sums: R*S*C."""
        return self.r * self.s * self.image[3]

    def windows(self, block: tuple[int, int]) -> tuple[int, int, int]:
        """Images, rows and columns of windows in a block of that many images and output rows."""
        n, rows = block
        return n, rows * self.windows_per_output, self.q * self.windows_per_output

    def blocks(self, workers: int = 1) -> list[Block]:
        """The problem cut up for so many threads: in blocks of taken_shape."""
        n, rows = self.taken_shape(workers)
        if rows < self.p:
            starts = range(0, self.p, rows)
            return [
                Block(slice(i, i + 1), slice(p, min(p + rows, self.p))) for i in range(self.image[0]) for p in starts
            ]
        return [Block(slice(i, min(i + n, self.image[0])), slice(0, self.p)) for i in range(0, self.image[0], n)]

    def blocks_by_images(self, workers: int = 1) -> list[list[Block]]:
        """Blocks of the same images together: what they give an error back to are the same pixels."""
        parts: dict[int, list[Block]] = {}
        for block in self.blocks(workers):
            parts.setdefault(block.images.start, []).append(block)
        return list(parts.values())

    @cached_property
    def block_shape(self) -> tuple[int, int]:
        """Images and output rows of the largest matrix that is multiplied: independent of the number of threads."""
        row_bytes = prod(self.windows((1, 1))) * (self.depth + self.outputs) * self.itemsize
        rows = max(1, BLOCK_BYTES // row_bytes)
        return (min(self.image[0], rows // self.p), self.p) if rows >= self.p else (1, rows)

    @cached_property
    def rows_a_product(self) -> int:
        """Windows in a block of block_shape."""
        return prod(self.windows(self.block_shape))

    @property
    def time_us(self) -> float:
        """About how long the convolution takes one thread: copies, product and epilogue."""
        m = self.image[0] * prod(self.windows((1, self.p)))
        copied = 0 if self.plain else m * self.depth
        return (
            m * self.depth * self.outputs / 60e3
            + copied / 2.5e3
            + m * self.outputs / (700 if self.geometry.pool else 3e3)
        )

    def taken_shape(self, workers: int) -> tuple[int, int]:
        """Images and output rows that one of so many threads takes in one go: one block_shape, or some of whole images."""
        n, rows = self.block_shape
        if rows == self.p:
            n *= together(-(-self.image[0] // n), workers, MOST_BLOCKS)
        return min(self.image[0], n), rows

    def count(self, block: Block) -> int:
        """How many products a block that is taken in one go is multiplied in."""
        return -(-prod(self.windows(block.shape)) // self.rows_a_product)

    def stacks(self, *matrices: np.ndarray) -> Iterator[list[np.ndarray]]:
        """Matrices with a row a window as stacks (blocks, rows, ...) of what is multiplied at a time: first the whole
        blocks of block_shape, then what is left. The products' bits depend on the problem alone, however many blocks a
        thread takes in one go."""
        m, step = len(matrices[0]), self.rows_a_product
        if m <= step:
            yield [a[None] for a in matrices]
            return
        whole = m // step * step
        yield [a[:whole].reshape(-1, step, *a.shape[1:]) for a in matrices]
        if whole < m:
            yield [a[None, whole:] for a in matrices]

    def padded_image(self, n: int) -> Shape:
        """n images with their padding; what is cropped is there, and no window sees it."""
        _, h, w, c = self.image
        top, left, bottom, right = (max(0, pad) for pad in self.geometry.pad)
        return n, h + top + bottom, w + left + right, c

    def padded_shape(self, block: tuple[int, int]) -> Shape:
        """The padded pixels (n, rows, W, C) that a block's windows see."""
        n, rows, _ = self.windows(block)
        g = self.geometry
        seen = (rows - 1) * self.stride[0] + (self.r - 1) * g.dilation[0] + 1
        return n, seen, self.image[2] + g.pad[1] + max(0, g.pad[3]), self.image[3]

    def columns_scratch(self, block: tuple[int, int]) -> list[Shape]:
        """Shapes of what columns() takes from the scratch memory."""
        if self.plain:
            return []
        columns = (prod(self.windows(block)), self.depth)
        return [self.padded_shape(block), columns] if self.padded else [columns]

    def columns(self, x: np.ndarray, block: Block, scratch: Scratch) -> np.ndarray:
        """The block's matrix (M, R*S*C); stored transposed where columns_outermost."""
        if self.plain:
            rows = slice(None) if self.p == 1 else block.rows
            return x[block.images, rows].reshape(-1, self.depth)
        seen = self.receptive(*self.pixels(x, block, scratch), block)
        n, p, q, r, s, c = seen.shape
        columns = scratch.take((seen.size,), x.dtype)
        if self.columns_outermost:
            np.copyto(columns.reshape(r, s, c, n, p, q), seen.transpose(3, 4, 5, 0, 1, 2))
            return columns.reshape(self.depth, -1).T
        np.copyto(columns.reshape(seen.shape), seen)
        return columns.reshape(-1, self.depth)

    def receptive(self, pixels: np.ndarray, offset: int, block: Block) -> np.ndarray:
        """What the block's windows see, (n,P,Q,R,S,C): a view of (padded) pixels; the first row seen is `offset`."""
        n, p, q = self.windows(block.shape)
        sn, sh, sw, sc = pixels.strides
        dilation = self.geometry.dilation
        shape = (n, p, q, self.r, self.s, pixels.shape[3])
        strides = (sn, sh * self.stride[0], sw * self.stride[1], sh * dilation[0], sw * dilation[1], sc)
        if not pixels.flags.c_contiguous:  # some of an image's channels
            return np.lib.stride_tricks.as_strided(pixels[:, offset:], shape, strides)
        return np.ndarray(shape, pixels.dtype, pixels, offset * sh, strides)  # the same, in a fifth of the time

    def pixels(self, x: np.ndarray, block: Block, scratch: Scratch) -> tuple[np.ndarray, int]:
        """The padded pixels that the block's windows see, and their first row; images of x itself without padding."""
        images = x[block.images]
        first = block.rows.start * self.windows_per_output * self.stride[0]
        if not self.padded:
            return images, first
        top, left, _, _ = self.geometry.pad
        _, h, w, _ = self.image
        pixels = scratch.take(self.padded_shape(block.shape), x.dtype)
        pixels.fill(0)
        start, stop = max(first - top, 0), min(first - top + pixels.shape[1], h)
        if start < stop:
            pixels[:, start - first + top : stop - first + top, left : left + w] = images[:, start:stop]
        return pixels, 0

    def filter_matrix(self, w: np.ndarray, scratch: Scratch) -> np.ndarray:
        """The filters (outputs, R*S*C)."""
        if not self.pool_as_filters:
            return w.reshape(self.outputs, self.depth)
        k, r, s, c = self.filters
        shifted = scratch.take((2, 2, k, self.r, self.s, c), w.dtype)
        shifted.fill(0)
        for i in (0, 1):
            for j in (0, 1):
                shifted[i, j, :, i : i + r, j : j + s] = w
        return shifted.reshape(self.outputs, self.depth)

    def fold_filters(self, gradient: np.ndarray, out: np.ndarray) -> None:
        """The way back of filter_matrix: the gradient of the filters, as they are, from that of the matrix."""
        if not self.pool_as_filters:
            np.copyto(out, gradient.reshape(self.filters))
            return
        k, r, s, c = self.filters
        shifted = gradient.reshape(2, 2, k, self.r, self.s, c)
        np.copyto(out, shifted[0, 0, :, :r, :s])
        for i, j in ((0, 1), (1, 0), (1, 1)):
            out += shifted[i, j, :, i : i + r, j : j + s]

    def candidates(self, matrix: np.ndarray, block: tuple[int, int], transposed: bool) -> np.ndarray:
        """The candidates of each pool window, (2,2,n,P,Q,K): a view of a product's result.

        The result is stored as (M, outputs), or as (outputs, M) where `transposed`.
        """
        n, p = block
        k, q = self.filters[0], self.q
        if self.pool_as_filters and transposed:
            return matrix.reshape(2, 2, k, n, p, q).transpose(0, 1, 3, 4, 5, 2)
        if self.pool_as_filters:
            return matrix.reshape(n, p, q, 2, 2, k).transpose(3, 4, 0, 1, 2, 5)
        if transposed:
            return matrix.reshape(k, n, p, 2, q, 2).transpose(3, 5, 1, 2, 4, 0)
        return matrix.reshape(n, p, 2, q, 2, k).transpose(2, 4, 0, 1, 3, 5)


@lru_cache(maxsize=4096)
def lowering(geometry: ConvGeometry, image: Shape, filters: Shape, itemsize: int) -> Lowering:
    """The lowering of a problem, made once."""
    return Lowering(geometry, image, filters, itemsize)
