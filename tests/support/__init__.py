"""What tests share: archives, bundles, clusters, faults."""
