module warmroute/tools/crds

go 1.26.7

require (
	github.com/envoyproxy/gateway v1.9.1
	github.com/prometheus-operator/prometheus-operator v0.85.0
	github.com/chaos-mesh/chaos-mesh v0.9.1-0.20260902003049-47411975a8cb
	sigs.k8s.io/gateway-api-inference-extension v1.3.1
)
