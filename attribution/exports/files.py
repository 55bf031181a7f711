"""The names of the files of an exported folder, by which they refer to each other."""

from attribution.verify_adapter import SIGNATURE_FILE

__all__ = ["SIGNATURE_FILE"]  # whoever verifies a folder knows it too

CARD_FILE = "README.md"
CYCLONEDX_FILE = "bom.cdx.json"
OPENLINEAGE_FILE = "openlineage.ndjson"
PROV_FILE = "prov.json"
PROVENANCE_FILE = "provenance.intoto.json"
PUBLIC_KEY_FILE = "model-signing.pub.pem"
TRUST_FILE = "trust.json"
ADAPTER_FOLDER = "adapter"
