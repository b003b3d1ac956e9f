import inspect

from accelerate.state import AcceleratorState


def test_accelerate_leaves_sharding_on_processors_to_its_caller():
    # Trainings in parts on two processes are in tests/training/test_processes.py.
    source = inspect.getsource(AcceleratorState)
    moved = "accelerate shards on processors, or moved its state: change weightgeom/compat/sharding.py"
    assert "DistributedType.MULTI_CPU" not in source, moved
    assert "self.distributed_type = DistributedType.FSDP" in source and "self.fsdp_plugin =" in source, moved
