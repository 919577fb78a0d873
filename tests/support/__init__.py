"""What tests share: archives, bundles, clusters, troubles."""
