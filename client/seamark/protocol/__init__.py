"""The contract that workers, agents, the lighthouse and the coordinator speak.

``messages`` lists every message, ``codec`` turns messages into frames and back, ``sockets`` is the one place
where ZeroMQ sockets get their options. The first two import no ZeroMQ, so that they can be used and tested
anywhere. The protocol belongs to the client library; the daemons import it.
"""
