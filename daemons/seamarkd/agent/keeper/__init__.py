"""The keeper: the parent of every worker of one job on one node.

    <the job's python> keeper/__main__.py --socket PATH --job NAME [--linger SECONDS] [--preload MODULE,...]

It has the job's modules loaded and no thread running, so that a worker is a fork away; it outlives its agent,
and so do exit codes. An agent asks it over a unix socket to start a process, to signal one, to list what
there is and to stop; every exit is pushed until it is acknowledged. Each packet is one JSON object, with file
descriptors beside it where noted:

    request                                         answer, with the request's id
    hello {epoch}                                   ready {pid, modules, forks, culprit, reason, ...}
    start {slot, incarnation, kind, env, log, ...}  started {pid, start_time, ...} + pidfd, progress page
      kind worker: {argv, module, cwd, num_threads, cpus, held}
      kind store: {host, port}
    release {slot, incarnation}                     released; a worker started as held waits for it
    signal {slot, incarnation, signum, group}       signalled {reached}
    list                                            known {...} + pidfd, progress page; ...; listed {count}
    acknowledge {slot, incarnation}                 acknowledged
    stop {grace, final}                             stopped {left}; after a final one the keeper ends
    any                                             error {code, error}
    (pushed)                                        exited {slot, incarnation, status, core, at, ...}
    (pushed)                                        superseded {epoch}

It runs by path in the job's interpreter, where Seamark needn't be installed: the standard library alone, and its own
parts named relative to each other, for there the package has a name of its own (`__main__`). Nothing here may start a
thread when it is imported, or be a socket of ZeroMQ's: neither outlives a fork. It knows nothing of ranks, restarts and
policies, makes no network connection, and never touches a GPU.

    program     the command line            loop        requests, exits, deadlines
    preload     importing ahead of workers  requests    what a request must contain
    forkable    fork or exec, and why       connection  packets to an agent
    launch      one process, from request   records     processes until acknowledged
    forking     what a fork has to shed     stop        whom to ask, whom to kill, when it is over
    spawning    the same by exec            ending      how a worker ends
    worker      a script as `__main__`      store       the TCPStore's server
"""
