"""
The policy on vLLM servers: it travels there in folders, and a server samples once it is checked and has it.

The main process talks to the servers, and samples for all processes.
"""
