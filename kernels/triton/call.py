"""One call of the operator by Triton kernels: arguments and launches. The passes are in `engine`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from llcompile.kernels.description import describe
from llcompile.kernels.grid import Grid, depth, make_grid
from llcompile.kernels.layout import Layout
from llcompile.kernels.operands import Operands
from llcompile.kernels.state import linear_state, position_of
from llcompile.kernels.triton import autotune, memory
from llcompile.kernels.triton.buffers import Arguments, operand_arguments
from llcompile.kernels.triton.chips import chip_of
from llcompile.kernels.triton.description import Description
from llcompile.kernels.triton.launch import Launch, kernels_of
from llcompile.kernels.triton.packing import PackedGrid, pack, packed_grid
from llcompile.kernels.triton.schedule import Entry


class Call(Layout):
    """The operands of one call as the kernels see them: `Layout` with every head folded into the batch."""

    def __init__(self, x: Operands, scale: float, final_state: bool) -> None:
        # Operands are not copied onto the grid: the kernels read them from where they are.
        self.x, self.scale = x, scale
        self.d = self._description(final_state)
        self.dtype = torch.float32
        self.batch, (_, self.tokens, self.heads, self.value_dim) = x.rows, x.v.shape
        self.key_dim = x.q.shape[3]
        self.levels = self.d.levels
        self.empty = x.v.numel() == 0 or x.q.numel() == 0
        if self.empty:
            return
        self.kernels = kernels_of(self.d, chip_of(x.v.device))
        self.grid = self._make_grid()
        self.arguments = Arguments(self.d, self._sizes(), x.lengths is not None, x.v.device)
        self._add_operands()
        self._add_geometry()
        self._add_old()

    def _description(self, final_state: bool) -> Description:
        return Description.of(describe(self.x, final_state))

    # -- arguments ----------------------------------------------------------------------------------------------------

    def _make_grid(self) -> Grid:
        position = None
        if self.d.continued:
            assert self.x.initial_state is not None
            position = position_of(self.x.initial_state)
        if self.x.starts is not None:
            assert self.x.lengths is not None
            return packed_grid(self.tokens, self.x.starts, self.x.lengths, position, self.d.chunk)
        grid = make_grid(self.tokens, position, self.x.lengths, self.d.chunk)
        offset = grid.offset
        if position is not None and offset is None:
            offset = torch.zeros_like(position)
        return dataclasses.replace(grid, chunk=self.d.chunk, chunks=-(-grid.size // self.d.chunk), offset=offset)

    def _sizes(self) -> dict[str, int]:
        """The axes of buffers."""
        d, chunks = self.d, self.grid.chunks
        old = 0
        if d.weighted and self.x.initial_state is not None:
            old = len(self._old_slots())
        return {
            **{"B": self.x.v.shape[0], "S": self.batch, "T": self.tokens, "H": self.heads, "L": d.levels or 0},
            **{"N": chunks, "N // 2": max(chunks // 2, 1), "depth": max(depth(chunks), 1)},
            **{"C": d.chunk, "K": d.key_dim, "V": d.value_dim, "2": 2, "32": 32},
            **{"old_levels": old, "old": min(old, 1), "end_levels": self.grid.levels + old},
        }

    def operand(self, name: str, x: Tensor | None) -> None:
        """Arguments of an operand, if there is one."""
        if x is not None:
            self.arguments |= operand_arguments(name, x, self.x.v.shape)

    def _add_operands(self) -> None:
        x, sizes = self.x, self.arguments.sizes
        self.operand("query", x.q)
        self.operand("key", x.k)
        self.operand("value", x.v)
        self.operand("weight", x.level_weights)
        self.operand("decay", x.log_decay)
        self.operand("beta", x.beta)
        self.operand("erase_query", x.erase_query)
        self.operand("erase_key", x.erase_key)
        self.arguments |= {
            **{"scale": float(self.scale), "heads": self.heads, "tokens": self.tokens, "chunks": sizes["N"]},
            **{"batch_heads": sizes["B"] * sizes["H"], "half": sizes["N // 2"]},
            **{"old_levels": sizes["old_levels"], "end_levels": sizes["end_levels"]},
        }

    def _add_geometry(self) -> None:
        grid = self.grid
        if grid.lengths is not None:
            self.arguments["lengths"] = grid.lengths.to(torch.int32)
        if isinstance(grid, PackedGrid):
            self.arguments |= {"starts": grid.starts.to(torch.int32), **pack(grid)._asdict()}
        if self.d.continued:
            assert grid.offset is not None
            assert self.d.levels is not None
            served = self._level_index()
            self.arguments |= {
                "offsets": grid.offset.to(torch.int32),
                "served_levels": served.to(torch.int32).contiguous(),
                "grid_levels": served.shape[1],
            }

    def _add_old(self) -> None:
        """The initial state: as it is for the linear operator, else level by level as the first token sees it."""
        s = self.x.initial_state
        if s is None:
            return
        if not self.d.weighted:
            self.arguments["initial_states"] = linear_state(s).float().contiguous()
            return
        old = self._old_states()
        assert old is not None
        seen = self._old_index()[0][..., self._old_slots().start :]
        self.arguments |= {
            "old_states": old.contiguous(),
            "old_seen": seen.to(torch.float32).contiguous(),
        }

    def final_state(self) -> Tensor:
        """The state after the last token, which the kernels have been run for."""
        if self.d.weighted:
            return self._final(self.arguments["level_states"].flatten(0, 1))
        found: Tensor = self.arguments["final_states"]
        return found

    def add_final_gradient(self, grad_state: Tensor) -> None:
        """Take the gradient of `final_state` as an argument."""
        if self.d.weighted:
            self.arguments["level_gradients"] = self._final_grad(self.with_tokens(grad_state)).contiguous()
        else:
            self.arguments["final_gradients"] = grad_state.float().contiguous()

    def with_tokens(self, grad_state: Tensor) -> Tensor:
        """The part of a final state's gradient that goes through the operator: rows without tokens have none."""
        if self.x.lengths is None:
            return grad_state
        return torch.where(self._without_tokens(grad_state), 0, grad_state)

    # -- launches -----------------------------------------------------------------------------------------------------

    def run(self, kernels: Mapping[str, Entry]) -> None:
        """Launch those of `kernels` that this call needs, in order; raises `KernelMemoryError` before that."""
        needed = {name: entry for name, entry in kernels.items() if entry.when(self.d)}
        memory.check(self.x, self.arguments, self.kernels, needed)
        autotune.run_all(self._launches(needed))

    def _launches(self, needed: Mapping[str, Entry]) -> Iterator[Launch]:
        """Each is made when the one before it has been run: buffers are allocated when a launch first takes them."""
        for name, entry in needed.items():
            for programs, changing in self._grids(entry):
                self.arguments |= changing
                yield Launch(self.kernels[name], self.arguments, programs, self.value_dim if entry.tiles else 0)

    def _grids(self, entry: Entry) -> Iterator[tuple[int, dict[str, int]]]:
        """The numbers of programs of a kernel's launches, each with the arguments that change from one to the next."""
        sizes = self.arguments.sizes
        batch_heads, chunks, heads = sizes["B"] * sizes["H"], sizes["N"], sizes["S"] * sizes["H"]
        if entry.over == "chunks":
            yield batch_heads * chunks, {}
        elif entry.over == "walked chunks":
            yield batch_heads * chunks * self.d.walk, {}
        elif entry.over == "heads":
            yield heads, {}
        elif entry.over == "old levels":
            yield heads * sizes["old_levels"], {}
        else:
            levels = range(self._joined_levels(chunks))
            for level in levels if entry.over == "pairs, up" else reversed(levels):
                # A packed sequence's last pair may end where no whole pair of all chunks does.
                pairs = -(-chunks // (2 << level)) if self.d.packed else chunks >> (level + 1)
                yield batch_heads * pairs, {"pairs": pairs, "level": level}

    def _joined_levels(self, chunks: int) -> int:
        """Levels at which neighbouring blocks become one: nothing reads the block of all chunks."""
        return depth(chunks) - 1
