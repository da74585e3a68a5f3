{{/* Names, labels, the image, and references to secrets. */}}

{{- define "manta.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name -}}
{{- end -}}
{{- end -}}

{{- define "manta.selectorLabels" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: manta
{{- end -}}

{{- define "manta.labels" -}}
{{ include "manta.selectorLabels" . }}
app.kubernetes.io/name: manta
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Pod labels. KubeRay finds the head by its own labels name and created-by, so these are not set here. */}}
{{- define "manta.podLabels" -}}
{{ include "manta.selectorLabels" .root }}
app.kubernetes.io/component: {{ .role }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "manta.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "manta.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "manta.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{/* {secretName, secretKey} of a secret that is given by name, or whose value is in the chart's own Secret under `key`. */}}
{{- define "manta.secretKeyRef" -}}
{{- if kindIs "string" .value -}}
name: {{ include "manta.fullname" .root }}
key: {{ .key }}
{{- else -}}
name: {{ .value.secretName }}
key: {{ .value.secretKey }}
{{- end -}}
{{- end -}}

{{- define "manta.claim" -}}
{{- .Values.cache.existingClaim | default (printf "%s-models" (include "manta.fullname" .)) -}}
{{- end -}}

{{/* Paths for clients outside the cluster. Not /metrics, which exposes all clients' requests, nor the probes' paths. */}}
{{- define "manta.publicPaths" -}}
[/v1, /tokenize, /detokenize, /tokenizer_info, /version, /health]
{{- end -}}

{{/* Error codes of failures that are the server's fault (serve/errors.py; stopped: serve/request_observer.py); they count against the availability objective. */}}
{{- define "manta.failureCodes" -}}
draining|host_lost|internal_error|invalid_logits|not_ready|poisoned_request|stopped|unavailable
{{- end -}}
