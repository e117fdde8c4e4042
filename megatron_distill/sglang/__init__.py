"""The only package that knows SGLang: servers are started, called, given new weights and stopped here.

    server        SGLangServer, ServerSpec, running, command: child processes and their command lines
    supervisor    starts a server again that died or hangs
    leash         ends a server when its owner ends
    readiness     waiting until every server of a run answers
    server_log    the end of a server's log, and the first error in it
    address       which of this machine's addresses another machine reaches it by
    client        SGLangClient: generate, score, and everything of control
    control       weight updates, pause and flush on all replicas
    wire          requests and replies as JSON, checked both ways
    transport     connections, balancing, retries
    model_dir     checks on weights before a server loads them
    hidden_states a hook by which a server sends a response's last hidden states
    cpu_plugin, cpu_platform, seeded_sampling   what SGLang needs on a machine without an accelerator

Nothing is imported here: SGLang itself imports ``cpu_plugin`` in each of its processes.
"""
