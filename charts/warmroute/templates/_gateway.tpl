{{/* Takes the root and a route. */}}
{{- define "warmroute.routeName" -}}
{{- printf "%s-%s" (include "warmroute.fullname" (index . 0)) (index . 1).name -}}
{{- end -}}

{{/* Whether a route asks warmroute: "true" or nothing. */}}
{{- define "warmroute.isExtProc" -}}
{{- if not (and (hasKey . "extProc") (eq .extProc false)) -}}true{{- end -}}
{{- end -}}

{{/* targetRefs of a policy for the routes that ask warmroute; nothing if there are none. */}}
{{- define "warmroute.routeTargets" -}}
{{- range .Values.envoyGateway.routes }}
{{- if include "warmroute.isExtProc" . }}
- group: gateway.networking.k8s.io
  kind: HTTPRoute
  name: {{ include "warmroute.routeName" (list $ .) }}
{{- end }}
{{- end }}
{{- end -}}
