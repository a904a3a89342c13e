"""Planted bugs: each one replaces a piece of the host's source; the simulator must notice."""

import importlib.util
import inspect
from pathlib import Path
from types import FunctionType, ModuleType
from typing import NamedTuple

from jaxinfer.host import batch, draft, loop, pages, plan, prefix, scheduler


class Mutant(NamedTuple):
    """`old` becomes `new`, once, in the source of a module."""

    name: str
    module: ModuleType
    old: str
    new: str

    def plant(self, monkeypatch, folder: Path) -> None:
        """Until the end of the test the module's classes behave as the changed source says."""
        source = inspect.getsource(self.module)
        assert source.count(self.old) == 1, f"{self.name}: {self.old!r} is not there once"
        path = folder / "mutant.py"
        path.write_text(source.replace(self.old, self.new))
        spec = importlib.util.spec_from_file_location("mutant", path)
        changed = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(changed)
        for name, kind in vars(changed).items():
            if isinstance(kind, type) and kind.__module__ == "mutant":
                for attribute, value in vars(kind).items():
                    is_own = not attribute.startswith("__") or attribute == "__init__"
                    if is_own and isinstance(value, FunctionType | property):
                        monkeypatch.setattr(getattr(self.module, name), attribute, value)


MUTANTS = [
    # pages
    Mutant(
        "release forgets the last page",
        pages,
        "reversed(list(pages))",
        "reversed(list(pages)[:-1])",
    ),
    Mutant(
        "release frees a page that others hold",
        pages,
        "            if self._num_owners[page]:\n                continue\n",
        "",
    ),
    Mutant(
        "release frees a kept page",
        pages,
        "            if self._is_kept[page]:\n",
        "            if False:\n",
    ),
    Mutant(
        "release keeps every page",
        pages,
        "            if self._is_kept[page]:\n",
        "            if True:\n",
    ),
    Mutant(
        "share counts nobody", pages, "self._num_owners[page] += 1", "self._num_owners[page] += 0"
    ),
    Mutant("share leaves the page idle", pages, "            self._idle.pop(page, None)\n", ""),
    Mutant(
        "take gives a page twice",
        pages,
        "heapq.heappop(self._free) for _ in range(count)",
        "self._free[0] for _ in range(count)",
    ),
    Mutant(
        "take evicts too early",
        pages,
        "while len(self._free) < count:",
        "while self._idle and len(self._free) < count + 1:",
    ),
    Mutant("take evicts the newest", pages, "next(iter(self._idle))", "next(reversed(self._idle))"),
    Mutant("evicted pages stay known", pages, "            self.on_evict(page)\n", ""),
    Mutant("early pages are evicted first", pages, "reversed(list(pages))", "list(pages)"),
    Mutant(
        "drop loses the page",
        pages,
        "            del self._idle[page]\n            heapq.heappush(self._free, page)\n",
        "            del self._idle[page]\n",
    ),
    # prefix
    Mutant(
        "a digest without salt",
        prefix,
        "(self._namespace.encode(), salt.encode())",
        "(self._namespace.encode(), b'')",
    ),
    Mutant("a digest without what came before", prefix, "blake2b(parent + part,", "blake2b(part,"),
    Mutant(
        "a page of another is published again",
        prefix,
        "if digest in self._known or page in self._digest_of:",
        "if page in self._digest_of:",
    ),
    Mutant(
        "a match goes on after a gap",
        prefix,
        "                break\n",
        "                continue\n",
    ),
    Mutant(
        "a match stops one page early",
        prefix,
        "        return pages\n",
        "        return pages[:-1]\n",
    ),
    Mutant(
        "forget drops no page",
        prefix,
        "                self._pool.drop(page)\n",
        "                pass\n",
    ),
    Mutant(
        "digests of the wrong tokens",
        prefix,
        "_digest(parent, tokens[start : start + size])",
        "_digest(parent, tokens[start : start + size - 1])",
    ),
    # scheduler: pages and tables
    Mutant(
        "a page too few",
        draft,
        "return -(-num_tokens // self._config.cache.page_size)",
        "return num_tokens // self._config.cache.page_size",
    ),
    Mutant(
        "a page too many for each",
        draft,
        "return -(-num_tokens // self._config.cache.page_size)",
        "return num_tokens // self._config.cache.page_size + 1",
    ),
    Mutant("a prefix ends inside a chunk", scheduler, "// step * step", "// size * size"),
    Mutant(
        "a prefix covers the last token",
        scheduler,
        "len(sequence.tokens) - 1) // step",
        "len(sequence.tokens)) // step",
    ),
    Mutant(
        "bypass is ignored on hit",
        scheduler,
        "        if not (self.config.cache.prefix and sequence.request.use_prefix_cache):\n"
        "            return ()\n",
        "",
    ),
    Mutant(
        "bypass is ignored on publish",
        scheduler,
        "        if not (self.config.cache.prefix and sequence.request.use_prefix_cache):\n"
        "            return\n",
        "",
    ),
    Mutant("shared pages have no owner more", scheduler, "        self.pool.share(shared)\n", ""),
    Mutant(
        "published before the step has returned",
        scheduler,
        "            sequence.num_stored += 1\n            sequence.num_pending += 1\n",
        "            sequence.num_stored += 1\n            sequence.num_pending += 1\n"
        "            sequence.num_written = sequence.num_stored\n"
        "            self._publish(sequence)\n",
    ),
    Mutant(
        "published with a NaN under way",
        scheduler,
        "                if sequence in sampled:\n    ",
        "                if True:\n    ",
    ),
    Mutant(
        "published a page too early",
        scheduler,
        "min(sequence.num_written, len(sequence.tokens)) // size",
        "-(-min(sequence.num_written, len(sequence.tokens)) // size)",
    ),
    Mutant("a broken row is published", scheduler, " and sequence not in broken:", ":"),
    Mutant(
        "pages of a broken row stay known",
        scheduler,
        "            self.prefix.forget(sequence.pages)\n",
        "",
    ),
    Mutant(
        "a step counts for one that is gone",
        scheduler,
        "            is_held = sequence.finish_reason is None and sequence.slot is not None\n"
        "            if is_held and sequence.num_preemptions == num_preemptions and",
        "            if sequence.slot == sequence.slot and",
    ),
    Mutant("revived pages count as free", draft, "        self._free_pages -= len(revived)\n", ""),
    Mutant("revived pages are counted twice", draft, " and page not in self._revived]", "]"),
    Mutant(
        "a preempted one keeps its pages",
        scheduler,
        "        self._free(sequence)\n        sequence.num_stored",
        "        sequence.num_stored",
    ),
    Mutant(
        "a preempted one believes in its pages",
        scheduler,
        "sequence.num_stored = sequence.num_written = sequence.num_published = 0",
        "sequence.num_published = 0",
    ),
    Mutant("a failure keeps the cache", scheduler, "        self.prefix.flush()\n", ""),
    Mutant(
        "a failure keeps what waits pending",
        scheduler,
        "        for sequence in self.waiting:\n            sequence.num_pending = 0\n",
        "",
    ),
    # scheduler: lines, slots, ends
    Mutant(
        "a cancel leaves the slot", scheduler, "            self.slots[sequence.slot] = None\n", ""
    ),
    Mutant(
        "a cancel leaves the pages",
        scheduler,
        "            self.waiting.remove(sequence)\n        self._free(sequence)\n",
        "            self.waiting.remove(sequence)\n",
    ),
    Mutant(
        "a cancel leaves the line",
        scheduler,
        "        if sequence.slot is None:\n            self.waiting.remove(sequence)\n"
        "        self._free",
        "        self._free",
    ),
    Mutant(
        "a token after the end",
        scheduler,
        "        if sequence.finish_reason is not None:\n            return False\n",
        "",
    ),
    Mutant("pending tokens are never done", scheduler, "        sequence.num_pending -= 1\n", ""),
    Mutant(
        "a token too many",
        scheduler,
        "num_outputs >= sampling.max_tokens",
        "num_outputs > sampling.max_tokens",
    ),
    Mutant(
        "a decode past the limit",
        draft,
        "return num_outputs < (room",
        "return num_outputs <= (room",
    ),
    Mutant(
        "no context limit", scheduler, ">= self.config.max_seq_len:", "> self.config.max_seq_len:"
    ),
    Mutant("an end token is not seen", scheduler, "if token in self._eos and", "if False and"),
    Mutant(
        "the line is by arrival alone",
        scheduler,
        "        self.num_arrived += 1\n        bisect.insort(self.waiting, "
        "sequence, key=lambda waiting: waiting.rank)\n",
        "        self.num_arrived += 1\n        self.waiting.append(sequence)\n",
    ),
    Mutant(
        "a victim goes to the end of the line",
        scheduler,
        "        self.num_preemptions += 1\n        "
        "bisect.insort(self.waiting, sequence, key=lambda waiting: waiting.rank)\n",
        "        self.num_preemptions += 1\n        self.waiting.append(sequence)\n",
    ),
    Mutant(
        "a deadline that can be met is given up",
        scheduler,
        "now_s + self._wait_s(sequence, pace) > deadline_s",
        "now_s + 2 * self._wait_s(sequence, pace) > deadline_s",
    ),
    Mutant(
        "one that holds a slot is given up",
        scheduler,
        "any(pace) and sequence.slot is None:",
        "any(pace):",
    ),
    Mutant(
        "what others have stored is to be prefilled",
        scheduler,
        "            stored.update(theirs[:num_full])\n",
        "",
    ),
    Mutant("a deadline is passed over", scheduler, "deadline_s <= now_s", "deadline_s < now_s - 2"),
    # scheduler: policy
    Mutant(
        "the budget is ignored",
        draft,
        "return chunk.size <= self._prefill_budget",
        "return True",
    ),
    Mutant(
        "the budget is never spent",
        draft,
        "            self._prefill_budget -= chunk.size\n",
        "",
    ),
    Mutant(
        "decodes starve beside prefill",
        scheduler,
        "            if not sequence.is_prefilling:\n",
        "            if not any(one.is_prefilling for one in self.running):\n",
    ),
    Mutant(
        "the first in line is preempted",
        draft,
        "self._drop(self._victim(victims, num_missing))",
        "self._drop(min(self._running, key=lambda one: one.rank))",
    ),
    Mutant(
        "priorities give way alike",
        draft,
        "        victims = [one for one in victims if one.request.priority == lowest]\n",
        "",
    ),
    Mutant("nobody is preempted", draft, "            if not victims:\n", "            if True:\n"),
    Mutant(
        "a victim still decodes",
        draft,
        "        self._decodes = [sequence for sequence in self._decodes if "
        "sequence is not victim]\n",
        "",
    ),
    Mutant(
        "a later one jumps the line",
        scheduler,
        "is_open = is_open and draft.admit(sequence)",
        "draft.admit(sequence)",
    ),
    Mutant("a slot is given twice", draft, "self._free_slots.pop(0)", "self._free_slots[0]"),
    Mutant(
        "plan writes",
        draft,
        "        self._revived += revived\n",
        "        self._revived += revived\n        sequence.num_to_prefill += 1\n",
    ),
    # batch and loop
    Mutant(
        "the row of a slot is stale",
        batch,
        "        self._fields.page_table[slot] = self._config.num_pages\n"
        "        self._fields.banned[slot] = -1\n",
        "        return\n",
    ),
    Mutant(
        "new pages are not told",
        batch,
        "        self._fields.page_table[sequence.slot, : len(sequence.pages)] = sequence.pages\n",
        "        pass\n",
    ),
    Mutant(
        "a decode at the wrong place",
        batch,
        "sequence.num_stored - 1 for sequence",
        "sequence.num_stored for sequence",
    ),
    Mutant(
        "rows of a prefill have the pages of one sequence",
        batch,
        "            slots[row] = sequence.slot\n",
        "            slots[: row + 1] = sequence.slot\n",
    ),
    Mutant(
        "rows of a prefill begin where the first one does",
        batch,
        "            fields.starts[row] = chunk.start\n",
        "            fields.starts[row:] = prefill.chunks[0].start\n",
    ),
    Mutant(
        "a prefill begins with the token sampled last",
        batch,
        "        fields.take_last[:] = 0\n",
        "",
    ),
    Mutant("half a seed", batch, "(seed & 0xFFFFFFFF, seed >> 32)", "(seed & 0xFFFFFFFF, 0)"),
    Mutant("bans are not lifted", batch, "        banned[:] = -1\n", ""),
    Mutant("bans are a token late", batch, "sequence.num_outputs - 1)", "sequence.num_outputs)"),
    Mutant("a lost step is read", loop, "        self.under_way.clear()\n", ""),
    Mutant("steps are read newest first", loop, "self.under_way.popleft()", "self.under_way.pop()"),
    Mutant(
        "tokens before pages",
        loop,
        "            self.scheduler.retire(plan, tokens, first)\n            for place",
        "            for place",
    ),
    Mutant("prefill samples twice", plan, "if chunk.is_last)", ")"),
]
