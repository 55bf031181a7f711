"""An adapter's lineage in other people's formats: CycloneDX, OpenLineage, PROV, SLSA provenance, a model card."""
