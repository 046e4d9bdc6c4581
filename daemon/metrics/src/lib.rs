//! Metrics in the OpenMetrics text format 1.0.0, and in the older text format of Prometheus (0.0.4).
//!
//! Most metrics are read from the daemon's state when they are asked for, so there is nothing to count twice: a [`Page`]
//! collects what each part of the daemon has to say at that moment, and [`Page::render`] writes it. Durations are counted
//! as they occur, in a [`Durations`].

#![warn(missing_docs)]

use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::encoding::{prometheus_text, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

/// The prefix of all names, except those that Prometheus' conventions reserve for processes.
const PREFIX: &str = "ovl";

/// Labels of a sample: names and values.
type Labels = Vec<(&'static str, String)>;

/// The base unit of a metric. It is the last part of the name, before `_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum In {
    /// No unit: a number of things, or a state.
    Numbers,
    /// Seconds.
    Seconds,
    /// Bytes.
    Bytes,
    /// A share, from 0 to 1.
    Ratio,
}

impl In {
    fn unit(self) -> Option<Unit> {
        match self {
            Self::Numbers => None,
            Self::Seconds => Some(Unit::Seconds),
            Self::Bytes => Some(Unit::Bytes),
            // The conventions of Prometheus have the singular, the library the plural.
            Self::Ratio => Some(Unit::Other("ratio".to_owned())),
        }
    }
}

/// The value of a sample. Integers are written as such.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value {
    /// An integer.
    Integer(u64),
    /// Any other number.
    Real(f64),
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        Self::Integer(value)
    }
}

impl From<u32> for Value {
    fn from(value: u32) -> Self {
        Self::Integer(value.into())
    }
}

impl From<usize> for Value {
    fn from(value: usize) -> Self {
        Self::Integer(value as u64)
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Integer(value.into())
    }
}

impl From<f64> for Value {
    fn from(value: f64) -> Self {
        Self::Real(value)
    }
}

impl From<Duration> for Value {
    /// Seconds.
    fn from(value: Duration) -> Self {
        Self::Real(value.as_secs_f64())
    }
}

#[derive(Debug)]
enum Sample {
    Number(Value),
    Info,
    Durations(Durations),
}

/// A metric with its samples.
#[derive(Debug)]
pub struct Family {
    prefix: Option<&'static str>,
    name: &'static str,
    help: &'static str,
    unit: In,
    kind: MetricType,
    samples: Vec<(Labels, Sample)>,
}

impl Family {
    /// Adds a sample. No other sample of this metric may have the same labels.
    pub fn with(&mut self, labels: &[(&'static str, &str)], value: impl Into<Value>) -> &mut Self {
        self.samples.push((owned(labels), Sample::Number(value.into())));
        self
    }

    /// Adds a sample if there is a value.
    pub fn with_some<V: Into<Value>>(
        &mut self,
        labels: &[(&'static str, &str)],
        value: Option<V>,
    ) -> &mut Self {
        match value {
            Some(value) => self.with(labels, value),
            None => self,
        }
    }

    /// Sets the only sample.
    pub fn is(&mut self, value: impl Into<Value>) {
        self.with(&[], value);
    }

    fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> std::fmt::Result {
        let name =
            self.prefix.map_or_else(|| self.name.to_owned(), |prefix| format!("{prefix}_{}", self.name));
        let unit = self.unit.unit();
        // The library adds the full stop of a help text only for metrics that it owns.
        let help = format!("{}.", self.help);
        let mut encoder = encoder.encode_descriptor(&name, &help, unit.as_ref(), self.kind)?;
        for (labels, sample) in &self.samples {
            match labels.is_empty() {
                true => encode_sample(&mut encoder, self.kind, sample)?,
                false if matches!(sample, Sample::Info) => encoder.encode_info(labels)?,
                false => encode_sample(&mut encoder.encode_family(labels)?, self.kind, sample)?,
            }
        }
        Ok(())
    }
}

fn owned(labels: &[(&'static str, &str)]) -> Labels {
    labels.iter().map(|(name, value)| (*name, (*value).to_owned())).collect()
}

fn encode_sample(encoder: &mut MetricEncoder<'_>, kind: MetricType, sample: &Sample) -> std::fmt::Result {
    match (kind, sample) {
        (MetricType::Counter, Sample::Number(Value::Integer(value))) => {
            encoder.encode_counter::<NoLabelSet, _, u64>(value, None)
        }
        (MetricType::Counter, Sample::Number(Value::Real(value))) => {
            encoder.encode_counter::<NoLabelSet, _, u64>(value, None)
        }
        (_, Sample::Number(Value::Integer(value))) => encoder.encode_gauge(value),
        (_, Sample::Number(Value::Real(value))) => encoder.encode_gauge(value),
        (_, Sample::Info) => encoder.encode_info(&Labels::new()),
        (_, Sample::Durations(durations)) => encoder.encode_histogram::<NoLabelSet>(
            durations.sum,
            durations.count(),
            &durations.buckets(),
            None,
        ),
    }
}

/// How metrics are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The OpenMetrics text format 1.0.0, which ends with a mark.
    OpenMetrics,
    /// The text format 0.0.4 of Prometheus, which everything understands.
    Prometheus,
}

impl Format {
    /// Returns the media type.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// The metrics of one moment.
#[derive(Debug, Default)]
pub struct Page(Vec<Family>);

impl Page {
    /// Adds a metric that can go up and down. `help` has no full stop at its end.
    pub fn gauge(&mut self, name: &'static str, unit: In, help: &'static str) -> &mut Family {
        self.add(Some(PREFIX), name, unit, help, MetricType::Gauge)
    }

    /// Adds a metric that only grows while the daemon runs. Its name gets the suffix `_total`.
    pub fn counter(&mut self, name: &'static str, unit: In, help: &'static str) -> &mut Family {
        self.add(Some(PREFIX), name, unit, help, MetricType::Counter)
    }

    /// Adds a metric of this process, whose name Prometheus' conventions give.
    pub fn process_gauge(&mut self, name: &'static str, unit: In, help: &'static str) -> &mut Family {
        self.add(None, name, unit, help, MetricType::Gauge)
    }

    /// Like [`Self::process_gauge`], for a metric that only grows.
    pub fn process_counter(&mut self, name: &'static str, unit: In, help: &'static str) -> &mut Family {
        self.add(None, name, unit, help, MetricType::Counter)
    }

    /// Adds what stays the same while the daemon runs. Its name gets the suffix `_info`.
    pub fn info(&mut self, name: &'static str, help: &'static str, labels: &[(&'static str, &str)]) {
        let family = self.add(Some(PREFIX), name, In::Numbers, help, MetricType::Info);
        family.samples.push((owned(labels), Sample::Info));
    }

    /// Adds durations, in seconds, each with its labels.
    pub fn durations<'a>(
        &mut self,
        name: &'static str,
        help: &'static str,
        each: impl IntoIterator<Item = (Vec<(&'static str, &'a str)>, &'a Durations)>,
    ) {
        let family = self.add(Some(PREFIX), name, In::Seconds, help, MetricType::Histogram);
        for (labels, durations) in each {
            family.samples.push((owned(&labels), Sample::Durations(durations.clone())));
        }
    }

    fn add(
        &mut self,
        prefix: Option<&'static str>,
        name: &'static str,
        unit: In,
        help: &'static str,
        kind: MetricType,
    ) -> &mut Family {
        let at = self.0.len();
        self.0.push(Family { prefix, name, help, unit, kind, samples: Vec::new() });
        &mut self.0[at]
    }

    /// Writes all metrics that have samples.
    pub fn render(mut self, format: Format) -> String {
        self.0.retain(|family| !family.samples.is_empty());
        let mut registry = Registry::default();
        registry.register_collector(Box::new(self));
        let mut text = String::new();
        // Writing into a string cannot fail.
        let _ = match format {
            Format::OpenMetrics => text::encode(&mut text, &registry),
            Format::Prometheus => prometheus_text::encode(&mut text, &registry),
        };
        text
    }
}

impl Collector for Page {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|family| family.encode(&mut encoder))
    }
}

/// The upper bounds of the buckets of [`Durations`], in seconds. Another bucket has no bound.
const BOUNDS: [f64; 15] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

/// Counts durations, from 0.1 ms to 10 s.
#[derive(Debug, Clone, Default)]
pub struct Durations {
    counts: [u64; BOUNDS.len() + 1],
    sum: f64,
}

impl Durations {
    /// Counts a duration.
    pub fn add(&mut self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let at = BOUNDS.partition_point(|bound| *bound < seconds);
        if let Some(count) = self.counts.get_mut(at) {
            *count += 1;
        }
        self.sum += seconds;
    }

    /// Returns the number of durations.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    fn buckets(&self) -> Vec<(f64, u64)> {
        BOUNDS.into_iter().chain([f64::INFINITY]).zip(self.counts).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_is_as_the_openmetrics_specification_has_it() {
        let mut page = Page::default();
        page.info("build", "The release", &[("version", "1.2.3")]);
        page.gauge("peer_up", In::Numbers, "1 if the host is alive")
            .with(&[("peer", "h2")], true)
            .with_some(&[("peer", "h3")], None::<u64>);
        page.counter("sent", In::Bytes, "Sent").is(1_u64 << 63);
        page.gauge("rtt", In::Seconds, "Round trip").is(Duration::from_micros(250));
        page.gauge("nothing", In::Numbers, "Has no sample");
        page.process_gauge("process_open_fds", In::Numbers, "Open file descriptors").is(7_u64);
        let expected = "\
# HELP ovl_build The release.
# TYPE ovl_build info
ovl_build_info{version=\"1.2.3\"} 1
# HELP ovl_peer_up 1 if the host is alive.
# TYPE ovl_peer_up gauge
ovl_peer_up{peer=\"h2\"} 1
# HELP ovl_sent_bytes Sent.
# TYPE ovl_sent_bytes counter
# UNIT ovl_sent_bytes bytes
ovl_sent_bytes_total 9223372036854775808
# HELP ovl_rtt_seconds Round trip.
# TYPE ovl_rtt_seconds gauge
# UNIT ovl_rtt_seconds seconds
ovl_rtt_seconds 0.00025
# HELP process_open_fds Open file descriptors.
# TYPE process_open_fds gauge
process_open_fds 7
# EOF
";
        assert_eq!(page.render(Format::OpenMetrics), expected);
    }

    #[test]
    fn duration_is_counted_in_the_bucket_whose_bound_it_does_not_exceed() {
        let mut durations = Durations::default();
        for millis in [0, 1, 2, 20_000] {
            durations.add(Duration::from_millis(millis));
        }
        let mut page = Page::default();
        page.durations("pass", "Passes", [(vec![("kind", "full")], &durations)]);
        let text = page.render(Format::OpenMetrics);
        for line in [
            "ovl_pass_seconds_sum{kind=\"full\"} 20.003",
            "ovl_pass_seconds_count{kind=\"full\"} 4",
            "ovl_pass_seconds_bucket{le=\"0.0005\",kind=\"full\"} 1",
            "ovl_pass_seconds_bucket{le=\"0.001\",kind=\"full\"} 2",
            "ovl_pass_seconds_bucket{le=\"10.0\",kind=\"full\"} 3",
            "ovl_pass_seconds_bucket{le=\"+Inf\",kind=\"full\"} 4",
        ] {
            assert!(text.lines().any(|each| each == line), "{line} in\n{text}");
        }
    }

    #[test]
    fn older_format_has_the_same_samples_and_no_mark() {
        let mut page = Page::default();
        page.counter("sent", In::Bytes, "Sent").is(7_u64);
        let text = page.render(Format::Prometheus);
        assert!(
            text.contains("# TYPE ovl_sent_bytes_total counter\n")
                && text.ends_with("ovl_sent_bytes_total 7\n"),
            "{text}"
        );
    }

    #[test]
    fn labels_are_escaped() {
        let mut page = Page::default();
        page.gauge("x", In::Numbers, "X").with(&[("name", "a\"b\\c\nd")], 1_u64);
        assert!(page.render(Format::OpenMetrics).contains(r#"ovl_x{name="a\"b\\c\nd"} 1"#));
    }
}
