"""What the benchmarks of the lighthouse share: both lighthouses as daemons, and the processes that load them.

Programs of their own, each a child that takes orders as JSON lines: ``seamark_members`` and ``torchft_members`` join
quorums, ``seamark_beats`` and ``torchft_beats`` send heartbeats, ``witness`` falls silent and waits to be missed.
Those of torchft run in its environment and import nothing of this project.
"""
