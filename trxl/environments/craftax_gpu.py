"""Rewriting of a game's step into elementwise operations, for GPUs.

Games index with computed values, `x[i]` and `x.at[i].set(y)`, and loop over a few creatures. Under
`vmap` these become gathers, scatters and loops, each at least one GPU kernel. Here short loops are
unrolled, and in small arrays all entries are compared with the index. XLA fuses these elementwise
operations with their surroundings. The results are the same. CPUs run the original faster, since
kernels cost nothing to launch there.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal
from jax.lax import GatherScatterMode

LONGEST_LOOP = 10
"""Largest number of steps of an unrolled scan."""

LONGEST_CHAIN = 80
"""Largest number of entries of a dimension in a chain of operations."""

LARGEST_READ, LARGEST_WRITTEN = 1024, 4096
"""Largest array size for rewritten reads and writes."""

Params = dict[str, Any]
"""Parameters of a primitive."""


def elementwise(function: Callable) -> Callable:
    """Rewrites a function of pytrees of arrays, which is traced once per shape of its arguments.

    During the trace `jax.lax.scan` is replaced by `scan`. `RULES` apply to the traced equations.
    """

    def rewritten(*args: Any) -> Any:
        def anew(*args: Any) -> Any:  # a new function, since JAX caches traces by function
            with mock.patch.object(jax.lax, "scan", scan):
                return function(*args)

        closed, shapes = jax.make_jaxpr(anew, return_shape=True)(*args)
        outputs = evaluate(closed, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return jax.jit(rewritten, inline=True)


def scan(f: Callable, init: Any, xs: Any = None, length: int | None = None, **options: Any):
    """Runs `jax.lax.scan`, unrolled if short."""
    steps = range(len(jax.tree.leaves(xs)[0]) if length is None else length)
    if len(steps) > LONGEST_LOOP:
        return jax_scan(f, init, xs, length, **options)
    order = steps[::-1] if options.get("reverse") else steps
    carry, ys = init, {}
    for i in order:
        carry, ys[i] = f(carry, jax.tree.map(lambda x, i=i: x[i], xs))
    return carry, jax.tree.map(lambda *y: jnp.stack(y), *(ys[i] for i in steps))


jax_scan = jax.lax.scan


def evaluate(closed: ClosedJaxpr, args: Sequence[jax.Array]) -> list[jax.Array]:
    """Evaluates a traced function, with `RULES` where they apply."""
    jaxpr = closed.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))

    def read(atom: Any) -> jax.Array:
        literal = isinstance(atom, Literal)
        return jnp.asarray(atom.val, atom.aval.dtype) if literal else values[atom]

    for equation in jaxpr.eqns:
        rule = RULES.get(equation.primitive.name)
        outputs = rule(equation.params, *map(read, equation.invars)) if rule else None
        if outputs is None:
            outputs = as_it_is(jaxpr, equation, values)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def as_it_is(jaxpr: Any, equation: Any, values: dict[Any, jax.Array]) -> list[jax.Array]:
    """Evaluates an equation with JAX itself, as a function of this equation alone."""
    read = list(dict.fromkeys(atom for atom in equation.invars if not isinstance(atom, Literal)))
    alone = jaxpr.replace(constvars=[], invars=read, outvars=equation.outvars, eqns=[equation])
    return jax.core.eval_jaxpr(alone, (), *(values[atom] for atom in read))


def call(params: Params, *inputs: jax.Array) -> list[jax.Array]:
    """Rewrites a call of an inner function."""
    return evaluate(params.get("jaxpr") or params["call_jaxpr"], inputs)


def branch(params: Params, index: jax.Array, *operands: jax.Array) -> list[jax.Array]:
    """Rewrites `lax.cond` and `lax.switch`, branch by branch."""
    branches = [
        lambda *args, branch=branch: evaluate(branch, args) for branch in params["branches"]
    ]
    return jax.lax.switch(index, branches, *operands)


def gather(params: Params, x: jax.Array, index: jax.Array) -> list[jax.Array] | None:
    """Rewrites x[i, j, ...] with one index into each of some dimensions, and whole others."""
    numbers, mode = params["dimension_numbers"], params["mode"]
    dims = numbers.start_index_map
    if not points_once(index, dims, numbers.collapsed_slice_dims):
        return None
    starts = [index[i] for i in range(len(dims))]
    found = look_up(x, params["slice_sizes"], dims, starts)
    if found is None:
        return None
    found = jnp.squeeze(found, dims)
    if mode == GatherScatterMode.FILL_OR_DROP:
        inside = [(at >= 0) & (at < x.shape[dim]) for dim, at in zip(dims, starts, strict=True)]
        found = jnp.where(reduce(jnp.logical_and, inside), found, filling(params, x.dtype))
    return [found]


def dynamic_slice(params: Params, x: jax.Array, *starts: jax.Array) -> list[jax.Array] | None:
    """Rewrites a dynamic slice of size 1 in the indexed dimensions, which are kept."""
    sizes = params["slice_sizes"]
    dims = [dim for dim, n in enumerate(x.shape) if sizes[dim] != n]
    found = look_up(x, sizes, dims, [starts[dim] for dim in dims])
    return None if found is None else [found]


def look_up(
    x: jax.Array, sizes: Sequence[int], dims: Sequence[int], starts: Sequence[jax.Array]
) -> jax.Array | None:
    """Reads `x` at one clipped index into each of `dims`, which keep size 1.

    Returns None if the array is too large, or if `sizes` is not 1 in `dims` and whole elsewhere.
    """
    if x.size > LARGEST_READ or any(
        size != 1 or n > LONGEST_CHAIN if dim in dims else size != n
        for dim, (size, n) in enumerate(zip(sizes, x.shape, strict=True))
    ):
        return None
    for dim, at in zip(dims, starts, strict=True):
        x, *others = entries(x, dim)
        for i, entry in enumerate(others, 1):
            x = jnp.where(at >= i, entry, x)
    return x


def scatter(params: Params, x: jax.Array, *inputs: jax.Array) -> list[jax.Array] | None:
    """Rewrites x.at[i, j, ...].set(y)."""
    where, update = written(params, x, *inputs)
    return None if where is None else [jnp.where(where, update, x)]


def scatter_add(params: Params, x: jax.Array, *inputs: jax.Array) -> list[jax.Array] | None:
    """Rewrites x.at[i, j, ...].add(y)."""
    where, update = written(params, x, *inputs)
    return None if where is None else [jnp.where(where, x + update, x)]


def written(
    params: Params, x: jax.Array, index: jax.Array, update: jax.Array
) -> tuple[jax.Array | None, jax.Array]:
    """Returns mask and values of a scatter, which broadcast to `x`; no mask if not supported."""
    numbers = params["dimension_numbers"]
    dims = numbers.scatter_dims_to_operand_dims
    whole = update.shape == tuple(n for dim, n in enumerate(x.shape) if dim not in dims)
    once = points_once(index, dims, numbers.inserted_window_dims)
    if x.size > LARGEST_WRITTEN or not (whole and once):
        return None, update
    where = jnp.ones((1,) * x.ndim, bool)
    for i, dim in enumerate(dims):
        at = index[i]
        if params["mode"] == GatherScatterMode.CLIP:
            at = jnp.clip(at, 0, x.shape[dim] - 1)
        wide = [n if d == dim else 1 for d, n in enumerate(x.shape)]
        where &= jax.lax.broadcasted_iota(at.dtype, wide, dim) == at
    return where, jnp.expand_dims(update, sorted(dims))


def points_once(index: jax.Array, dims: Sequence[int], gone: Sequence[int]) -> bool:
    """Returns whether `index` is one position in `dims`, all of which are dropped."""
    return index.shape == (len(dims),) and sorted(dims) == sorted(gone)


def reduction(combine: Callable, any_order: bool) -> Callable:
    """Makes the rule of a reduction by `combine`; for floats only if order does not matter."""

    def rule(params: Params, x: jax.Array) -> list[jax.Array] | None:
        axes = params["axes"]
        lengths = [x.shape[axis] for axis in axes]
        ordered = any_order or not jnp.issubdtype(x.dtype, jnp.inexact)
        if not ordered or not all(0 < length <= LONGEST_CHAIN for length in lengths):
            return None
        for axis in axes:
            x = reduce(combine, entries(x, axis))
        return [jnp.squeeze(x, axes)]

    return rule


def argmax(params: Params, x: jax.Array) -> list[jax.Array] | None:
    """Rewrites argmax, the first of the largest entries."""
    (axis,) = params["axes"]
    if x.shape[axis] > LONGEST_CHAIN or jnp.issubdtype(x.dtype, jnp.inexact):
        return None
    largest, *others = entries(x, axis)
    found = jnp.zeros(largest.shape, params["index_dtype"])
    for i, entry in enumerate(others, 1):
        found = jnp.where(entry > largest, i, found)
        largest = jnp.maximum(entry, largest)
    return [jnp.squeeze(found, axis)]


def entries(x: jax.Array, axis: int) -> list[jax.Array]:
    """Returns the slices along an axis, each of size 1."""
    return [jax.lax.slice_in_dim(x, i, i + 1, axis=axis) for i in range(x.shape[axis])]


def filling(params: Params, dtype: Any) -> jax.Array:
    """Returns the fill value of an out-of-bounds gather: as in JAX, NaN or an extreme number."""
    value = params["fill_value"]
    if value is None and jnp.issubdtype(dtype, jnp.inexact):
        value = jnp.nan
    elif value is None and jnp.issubdtype(dtype, jnp.bool):
        value = True
    elif value is None:
        signed = jnp.issubdtype(dtype, jnp.signedinteger)
        value = jnp.iinfo(dtype).min if signed else jnp.iinfo(dtype).max
    return jnp.asarray(value, dtype)


RULES: dict[str, Callable] = {
    **dict.fromkeys(("jit", "closed_call", "custom_jvp_call", "custom_vjp_call"), call),
    "cond": branch,
    "gather": gather,
    "dynamic_slice": dynamic_slice,
    "scatter": scatter,
    "scatter-add": scatter_add,
    "argmax": argmax,
    "reduce_sum": reduction(jnp.add, any_order=False),
    "reduce_max": reduction(jnp.maximum, any_order=True),
    "reduce_min": reduction(jnp.minimum, any_order=True),
    "reduce_and": reduction(jnp.bitwise_and, any_order=True),
    "reduce_or": reduction(jnp.bitwise_or, any_order=True),
}
"""Rules by primitive: (parameters, *inputs) -> outputs, or None to leave the equation unchanged."""
