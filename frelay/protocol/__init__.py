"""frelay/1 without any I/O: names, frames, messages, and the states of a leg. Standard library only.

``docs/protocol.md`` is the contract in words; the modules here are the same contract as code, shared by the relay
and by what runs inside a function.
"""
