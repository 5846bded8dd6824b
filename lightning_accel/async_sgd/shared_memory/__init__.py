"""The engine of one machine: worker processes, shared memory and sockets that carry what the policy decides."""
