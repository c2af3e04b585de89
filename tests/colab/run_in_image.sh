#!/usr/bin/env bash
# Run every notebook of /repository as Colab would: alone in an empty folder, lcx not installed before.
# Called by .github/workflows/colab.yml inside Colab's image; each notebook is tried even if one before it failed.
set -uo pipefail

torch_before=$(python3 -c "import torch; print(torch.__version__)")
failed=()
for notebook in /repository/notebooks/*.ipynb; do
  name=$(basename "$notebook" .ipynb)
  folder=$(mktemp -d)
  cp "$notebook" "$folder/"
  echo "::group::$name"
  (cd "$folder" && jupyter nbconvert --to notebook --execute --output done.ipynb "$name.ipynb" \
    --ExecutePreprocessor.timeout=1200 --ExecutePreprocessor.kernel_name=python3) || failed+=("$name")
  echo "::endgroup::"
  python3 -m pip uninstall --quiet --yes lcx
done
torch_after=$(python3 -c "import torch; print(torch.__version__)")

if [ "$torch_before" != "$torch_after" ]; then
  echo "::error::the set-up cell replaced torch $torch_before by $torch_after"
  exit 1
fi
if [ ${#failed[@]} -gt 0 ]; then
  echo "::error::failed: ${failed[*]}"
  exit 1
fi
