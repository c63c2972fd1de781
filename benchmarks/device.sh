# Makes this checkout importable without installing it (no network, no pip): `. benchmarks/device.sh` from the repository's root, then `python benchmarks/...` or `python -P -m pytest`.
site=$(mktemp -d)
cp -r qcompile "$site/qcompile" && cp -r passes "$site/qcompile/passes" && cp -r kernels "$site/qcompile/kernels"
mkdir "$site/qcompile-0.1.0.dist-info"
printf 'Metadata-Version: 2.1\nName: qcompile\nVersion: 0.1.0\n' > "$site/qcompile-0.1.0.dist-info/METADATA"
printf '[torch_dynamo_backends]\nqcompile = qcompile.backend:backend\n' > "$site/qcompile-0.1.0.dist-info/entry_points.txt"
export PYTHONPATH="$site" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
