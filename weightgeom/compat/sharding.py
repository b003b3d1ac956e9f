"""Sharding on processors, which accelerate leaves to accelerators."""

from typing import Any

from weightgeom.compat.torch_internals import release_memory


def shard_on_processors(trainer: Any) -> None:
    """Give a trainer on processors, which is mutated, the sharding that it has on GPUs.

    `AcceleratorState` of accelerate 1 takes a `fsdp_plugin` on GPUs only, and says nothing elsewhere; all
    else of FSDP2 runs on gloo. The reference of a `DPOTrainer` of TRL 1 is sharded as well, layer
    by layer: TRL would gather it whole. From here on the process gives gathered weights back to the system
    when they are freed, which would stay on the heap of the C library.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, fsdp2_prepare_model

    release_memory()
    state = trainer.accelerator.state
    plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
    trainer.is_fsdp_enabled = True
    if getattr(trainer, "ref_model", None) is not None:
        trainer.ref_model = fsdp2_prepare_model(trainer.accelerator, trainer.ref_model.eval())
