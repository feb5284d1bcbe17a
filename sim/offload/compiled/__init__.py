"""The compiled simulator of the offload model, cut along its numbered phases."""
