"""`Model` puts the parts together and is what callers hold."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch

from ..cache.stats import RunStats
from ..quant.triton_kernels import load_triton
from . import hf, memory
from .chat import Conversation
from .config import OffloadConfig
from .device import Device, memory_errors
from .device_runtime import DeviceRuntime
from .device_tier import make_device_runtime, open_device, warm_up
from .errors import DataError, UsageError, VramBudgetError
from .experts import make_device_kernels, make_kernels, open_pool
from .foresight import foresee
from .generate import Chunk, Completion, Sequence, stream_answer
from .hf_families import STEPWISE
from .hf_norms import fuse_norms
from .lean import make_lean_decoder
from .native_cache import make_cache
from .planning import plan_load
from .popularity import Popularity
from .predictor import RouterPredictor
from .prefetch import NoPrefetch, Prefetcher
from .ram_table import RamTable
from .reasoning import AnswerFormat
from .recorder import make_recorder
from .runtime import ExpertRuntime
from .sampling import read_generation_config
from .source import OnNotice, OnProgress
from .store import ExpertStore
from .templates import make_template
from .tiers import RamSlots
from .tokenizer import load_tokenizer
from .transfer import ThreadedTransfers
from .trunk import find_linear, load_packed_trunk, warm_up_trunk
from .warm_start import WarmStart

_OUT_OF_MEMORY_STEP = 256 << 20
"""Bytes of slots that give way when a GPU's memory runs out in the middle of an answer."""


class Model:
    """A loaded model. Use it as a context manager, or call `close`."""

    def __init__(
        self,
        path: Path,
        config: OffloadConfig,
        on_progress: OnProgress | None = None,
        on_notice: OnNotice | None = None,
        device: Device | None = None,
    ) -> None:
        """Use `load`. `device` replaces the one that the config names (for tests)."""
        notice = on_notice or (lambda _: None)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.path, self._notice = path, notice
        self._store = ExpertStore(path, config.io, config.verify, notice)
        try:
            self._recorder = make_recorder(config.trace, self._store.manifest, config.trace_tokens)
            try:
                self._load(config, device or open_device(config, notice), on_progress, notice)
            except VramBudgetError as error:
                if config.device != "auto" or config.vram is not None:
                    raise
                notice(f"{error}. The CPU computes instead.")
                self._load(config, None, on_progress, notice)
        except BaseException:
            self._store.close()
            raise

    def _load(
        self, config: OffloadConfig, device: Device | None, on_progress: OnProgress | None, notice: OnNotice
    ) -> None:
        store, manifest = self._store, self._store.manifest
        pool = open_pool(config, notice)
        hf.check_version(notice)
        linear = find_linear(pool, device, config, bool(manifest.trunk_packed), notice)
        # The CPU's kernels compute in float32; with half-precision activations each would convert back and forth.
        packed = manifest.trunk_packed if linear is not None and device is None else {}
        skeleton = hf.build_skeleton(hf.read_config(self.path), torch.float32 if packed else None)
        if [site.layer for site in skeleton.sites] != manifest.layers:
            raise DataError(f"{self.path}: config.json and pocketmoe.json describe different experts; convert again")
        self.tokenizer = load_tokenizer(self.path)
        self._template, self._answers = make_template(self.tokenizer, notice), AnswerFormat(self.tokenizer)
        self.sampling, self._ends = read_generation_config(self.path)
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            self._ends.add(self.tokenizer.eos_token_id)
        has_kernels = pool is not None if device is None else device.lacks is None and load_triton() is not None
        self._workspace, self._kv_dtype = foresee(skeleton, has_kernels, bool(packed), config.kv, device is None)
        if skeleton.config.get_text_config().model_type in STEPWISE:
            notice(
                f"beyond {config.prefill_chunk} tokens a prompt goes through one by one: transformers' layers of this "
                "type take no more onto their state"
            )
        plan, self.vram_plan = plan_load(
            skeleton, manifest, config, self._workspace, self._kv_dtype, linear is not None, device, notice
        )
        needs = plan.needs
        if device is not None and self.vram_plan is not None and config.vram is not None:
            device.limit(config.vram - self.vram_plan.needs.program)
        with memory_errors("the GPU" if device is None else device.name):
            where = torch.device("cpu") if device is None else device.torch_device
            load_packed_trunk(skeleton, store, linear, on_progress, where)
            if device is not None:
                fuse_norms(skeleton.model)
            hf.find_router_norms(skeleton)  # also a first forward: libraries load what they need now, before we measure
        self.plan = plan = self._planned_again(plan)
        self._step_threads = 1 if packed else None
        self.config = config
        self.context = needs.context
        self._on_device: DeviceRuntime | None = None
        self.transformers_model: Any = skeleton.model
        self._closed = False
        layers = manifest.layers
        self._stats = RunStats(
            len(layers),
            store.record_bytes,
            slots=plan.slots,
            total_experts=manifest.num_experts,
            ram_budget_bytes=plan.budget,
            model=manifest.source,
            codec=manifest.codec,
            policy=config.policy,
            io=store.io,
            store=str(self.path.resolve()),
        )
        experts = [layer.num_experts for layer in layers]
        slots = RamSlots(plan.slots, store.record_bytes)
        table, floor = RamTable(slots, experts), max(layer.top_k for layer in layers)
        try:
            cache = make_cache(config.policy, plan.slots, needs.floor, experts, floor, table)
        except ValueError as error:
            raise UsageError(str(error)) from None
        transfers = ThreadedTransfers(store, self._stats, config.readers)
        ahead = Prefetcher(cache, slots, transfers, self._stats, experts=experts) if config.prefetch else NoPrefetch()
        self._popularity = Popularity(store.path, manifest)
        wanted = self._popularity.order(notice) if config.warm_start else []
        ahead = warm = WarmStart(ahead, cache, slots, transfers, wanted)
        try:
            predictor = RouterPredictor(skeleton.sites) if config.prefetch else None
            kernels = make_kernels(skeleton.sites, manifest, config, pool, notice)
            self._stats.kernels = kernels[0].name
            self._runtime = ExpertRuntime(
                cache, slots, transfers, kernels, self._stats, ahead, predictor, self._recorder, table
            )
            # Whatever runs the layers is looked up late: a device may come above before the first answer.
            hf.attach(
                skeleton, lambda site, *tensors: (self._on_device or self._runtime).run_layer(site.index, *tensors)
            )
            self._lean = make_lean_decoder(skeleton, pool, self._runtime, notice) if device is None else None
            self._workspace = self._workspace._replace(lean=self._lean is not None)
            above = [] if device is None else make_device_kernels(skeleton.sites, manifest, config, device, notice)
            if device is not None:  # before the last plan: Triton and what it compiles take memory
                warm_up(device, above, [layer.shape for layer in layers], store.record_bytes)
                with memory_errors(device.name):
                    warm_up_trunk(skeleton.model)
            self._hold_to_plan()
            if device is not None and self.vram_plan is not None:
                widths = [site.layer.shape.hidden for site in skeleton.sites]
                self._on_device = make_device_runtime(
                    device, self.vram_plan, self._runtime, above, config, widths, experts, notice
                )
            warm.start()
        except BaseException:
            transfers.close()  # its threads would wait for ever
            raise
        self.transformers_model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self.transformers_model.register_forward_hook(self._after_forward, always_call=True)

    # Text in, text out

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def generate(self, prompt: str, **options: Any) -> Completion:
        """The whole answer to a prompt. Options as for `stream`."""
        chunks = list(self.stream(prompt, **options))
        snapshot = self._stats.snapshot()
        return Completion(
            "".join(c.text for c in chunks),
            snapshot.prompt.tokens,
            chunks[-1].tokens,
            chunks[-1].finish_reason or "",
            "".join(c.thinking for c in chunks),
        )

    def stream(
        self,
        prompt: str,
        *,
        system: str | None = None,
        raw: bool = False,
        on_progress: OnProgress | None = None,
        **options: Any,
    ) -> Iterator[Chunk]:
        """Answer a prompt piece by piece.

        Args:
            system: a system message.
            raw: continue the text as it is, without the chat template.
            options: fields of `Sampling`; the model's own defaults otherwise.
        """
        if raw or not self.has_chat_template:
            ids, rendered = self.encode(prompt, special=True), None
        else:
            messages = [{"role": "system", "content": system}] if system else []
            rendered = self.render_chat([*messages, {"role": "user", "content": prompt}], True)
            ids = self.encode(rendered)
        yield from self.answer(self.new_sequence(), ids, [], on_progress, rendered, **options)

    def chat(self, system: str | None = None) -> Conversation:
        """A new conversation."""
        conversation = Conversation(self, system)
        conversation.require_template()
        return conversation

    def answer(
        self,
        sequence: Sequence,
        ids: list[int],
        generated: list[int],
        on_progress: Callable[..., None] | None = None,
        rendered: str | None = None,
        **options: Any,
    ) -> Generator[Chunk, None, None]:
        """Feed new tokens to a sequence and stream the answer; `generated` is filled with its token ids.

        Args:
            rendered: the chat that is answered, as `render_chat` made it; it tells what of the answer is thought.
        """
        if self._closed:
            raise UsageError("this model has been closed")
        sampling, form = self.sampling.with_options(**options), None if rendered is None else self._answers
        if not sequence.ids:
            self._recorder.new_sequence()
        try:
            yield from stream_answer(
                sequence,
                self.tokenizer,
                ids,
                sampling,
                set() if sampling.ignore_eos else self._ends,
                self._stats,
                on_progress,
                generated,
                self._after_step,
                form and form.splitter(rendered or ""),
                form and form.hidden,
            )
        finally:
            self._after_forward()  # torch runs no hook after Ctrl-C

    def new_sequence(self) -> Sequence:
        """An empty sequence with room for the whole context."""
        return Sequence(
            self.transformers_model,
            self.context,
            self.config.prefill_chunk,
            self._step_threads,
            self._lean,
            self._kv_dtype,
            self._free_device_memory,
            self._recorder.feed,
        )

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids; `special` adds what the tokenizer puts around a text (a rendered chat has it already)."""
        return self._require_tokenizer()(text, add_special_tokens=special)["input_ids"]

    def decode_exactly(self, ids: list[int]) -> str:
        return self._require_tokenizer().decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def render_chat(self, messages: list[dict[str, Any]], generation_prompt: bool) -> str:
        """Messages as the text that the model's chat template makes of them. Raises what `ChatTemplate.render` does."""
        self._require_tokenizer()
        if self._template is None:
            raise UsageError(f"{self.path} has no chat template")
        return self._template.render(messages, generation_prompt)

    def _require_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise UsageError(f"{self.path} has no tokenizer files; only token ids can be used (transformers_model)")
        return self.tokenizer

    # State

    def _planned_again(self, plan: memory.MemoryPlan) -> memory.MemoryPlan:
        """The plan with what the program takes now, the trunk being in memory."""
        memory.return_freed_memory()
        needs = plan.needs
        program = max(needs.program, memory.resident_bytes() - needs.trunk)
        step = self._workspace.bytes(1, needs.context)
        workspace = needs.workspace if self.vram_plan is None else step  # there, it was for the trunk passing through
        return memory.adjust(plan, needs._replace(program=program, step=step, workspace=workspace))

    def _hold_to_plan(self) -> None:
        """Plan once more now that everything but experts and KV cache is in memory."""
        self.plan = self._planned_again(self.plan)
        if self.plan.slots < self._runtime.cache.capacity:
            self._runtime.resize(self.plan.slots)
        self._slots = self._stats.slots = self.plan.slots
        self._stats.ram_budget_bytes = self.plan.budget

    def _before_forward(self, _module: Any, args: Any, kwargs: Any) -> None:
        """A prompt borrows its workspace from the experts' slots."""
        given = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        tokens = given.shape[0] * given.shape[1] if torch.is_tensor(given) else self.config.prefill_chunk
        if tokens > 1 and self._on_device is None:
            cache = kwargs.get("past_key_values")
            length = tokens + (cache.get_seq_length() if cache is not None else 0)
            slots = min(self._slots, self.plan.slots_beside(self._workspace.bytes(tokens, length)))
            if slots < self._runtime.cache.capacity:
                self._runtime.resize(slots)

    def _after_forward(self, *_: Any) -> None:
        """Give the slots back that a prompt has borrowed, if it has."""
        if not self._closed and self._runtime.cache.capacity < self._slots:
            memory.return_freed_memory()
            self._runtime.resize(self._slots)

    def _after_step(self) -> None:
        """Hold the budget: if something else in the process grew, slots give way."""
        if self._on_device is not None:  # pinned slots cannot be given back
            return
        over = memory.resident_bytes() - self.plan.budget
        if over > 0 and (slots := self._slots - -(-over // self._store.record_bytes)) >= self.plan.needs.floor:
            self._runtime.resize(slots)
            self._slots = self._stats.slots = slots
            self._notice(f"memory grew beyond the plan: {slots:,} expert slots remain")

    def _free_device_memory(self, tokens: int, cached: int) -> bool:
        """A step of `tokens` after those that are cached has run out of the device's memory: slots give way. False
        when none can."""
        if self._on_device is None or self.vram_plan is None:
            return False
        asked = self._workspace.bytes(tokens, cached + tokens) + (0 if cached else self.vram_plan.needs.kv)
        freed = self._on_device.shrink(-(-max(asked, _OUT_OF_MEMORY_STEP) // self._store.record_bytes))
        if freed:
            self._notice(f"the GPU's memory ran out: {self._on_device.cache.capacity:,} expert slots remain there")
        return freed > 0

    def stats(self, advice: bool = False) -> RunStats:
        """A snapshot of the counters since the load or the last `reset_stats`.

        Args:
            advice: also the latest tokens' routing and who is in a slot, from which the report says what other policies
                and budgets would give.
        """
        snapshot = self._stats.snapshot()
        snapshot.peak_rss_bytes = memory.peak_resident_bytes()
        if advice:
            snapshot.history = self._runtime.history.copy()
            snapshot.residents = list(self._runtime.cache.residents())
        return snapshot

    def reset_stats(self) -> None:
        self._stats.reset()
        self._runtime.history.clear()

    def check_integrity(self) -> None:
        """Raises AssertionError when the cache's books or the statistics do not add up (for tests)."""
        self._runtime.prefetch.drain()
        if self._on_device is not None:
            self._on_device.drain()
            self._on_device.cache.check_integrity(idle=True)
        self._runtime.cache.check_integrity(idle=True)
        self._stats.check()

    def close(self) -> None:
        """Stop the reading threads and give the memory back. The model cannot be used afterwards."""
        if not self._closed:
            self._closed = True
            (self._on_device or self._runtime).close()
            if self.config.warm_start:
                self._popularity.add(self._stats.snapshot().uses)
            self._store.close()
            self._recorder.close()
            if self._template is not None:
                self._template.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
