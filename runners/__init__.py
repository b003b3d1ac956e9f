"""Order, storage, launching and tracking of experiments: no mathematics."""
