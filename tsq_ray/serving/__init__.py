"""The Serve graph, its replicas in bulk scoring, and the endpoint over HTTP."""
