//! `ovlctl apply`, `get`, `describe`, `delete` and `diff`: Kubernetes objects, with the wording of kubectl.

mod describe;
mod diff;
mod files;
mod table;

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use ovl_control::{
    Action, Applied, AppliedAll, Apply, Client, Document, Reply, Request, ResourceInfo, ResourceQuery,
    ServiceBackends,
};
use ovl_manifest::yaml::to_yaml;
use ovl_proto::resource::{DEFAULT_NAMESPACE, Kind, Name, ResourceKey, Validation};
use serde_json::{Value, json};

use crate::args::Output;
use crate::context::{Context, write_out};
use crate::error::{Error, Result};
use crate::text::printable_lines;

/// Request timeout in seconds. Ten thousand objects take some seconds to sign and write.
const TIMEOUT_S: u64 = 120;
/// Maximum size of the documents in one request, in bytes: half the size limit of a request.
const MAX_PART_BYTES: usize = 512 << 10;

/// Options that select manifests.
#[derive(Debug, clap::Args)]
pub(crate) struct Files {
    /// A file, a directory of files, or `-` for standard input; may be repeated
    #[arg(short = 'f', long = "filename", value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// The namespace of objects that do not name one [default: default]
    #[arg(short, long, value_name = "NS")]
    namespace: Option<String>,
    /// Read directories recursively
    #[arg(short = 'R', long)]
    recursive: bool,
}

/// Arguments of `apply`.
#[derive(Debug, clap::Args)]
pub(crate) struct ApplyArgs {
    #[command(flatten)]
    files: Files,
    /// Check the objects without writing them
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    checks: Checks,
}

/// Options that say how strictly manifests are checked.
#[derive(Debug, clap::Args)]
pub(crate) struct Checks {
    /// How to treat fields that the Kubernetes API does not have: as errors, as warnings, or not at all
    #[arg(long, value_name = "MODE", default_value = "strict", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "strict", value_parser = validation)]
    validate: Validation,
    /// The same as `--validate=warn`
    #[arg(long, conflicts_with = "validate")]
    lenient: bool,
    /// Refuse kinds and fields that ovl does not act on
    #[arg(long)]
    strict: bool,
}

impl Checks {
    fn validation(&self) -> Validation {
        if self.lenient { Validation::Warn } else { self.validate }
    }
}

/// Parses the modes of kubectl, which also has `true` and `false`.
fn validation(mode: &str) -> std::result::Result<Validation, String> {
    match mode {
        "strict" | "true" => Ok(Validation::Strict),
        "warn" => Ok(Validation::Warn),
        "ignore" | "false" => Ok(Validation::Ignore),
        _ => Err("use strict, warn or ignore".to_owned()),
    }
}

/// Arguments of `diff`.
#[derive(Debug, clap::Args)]
pub(crate) struct DiffArgs {
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    checks: Checks,
}

/// Arguments of `get` and `describe`.
#[derive(Debug, clap::Args)]
pub(crate) struct GetArgs {
    /// Kind: `svc`, `pods`, `netpol`, `ns`, `endpointslices` or `ep`; several separated by commas; or
    /// KIND/NAME
    kind: String,
    /// Only the object of this name
    name: Option<String>,
    /// The namespace [default: default]
    #[arg(short, long, value_name = "NS", conflicts_with = "all_namespaces")]
    namespace: Option<String>,
    /// List objects of all namespaces
    #[arg(short = 'A', long)]
    all_namespaces: bool,
}

/// Arguments of `delete`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("what").args(["kind", "files"]).required(true))]
pub(crate) struct DeleteArgs {
    /// Kind: `svc`, `pod`, `netpol`, `ns` or `endpointslice`; or KIND/NAME
    kind: Option<String>,
    /// Names of the objects
    names: Vec<String>,
    /// Delete the objects of a file, a directory of files, or `-` for standard input; may be repeated
    #[arg(short = 'f', long = "filename", value_name = "FILE", conflicts_with = "kind")]
    files: Vec<PathBuf>,
    /// The namespace [default: default]
    #[arg(short, long, value_name = "NS")]
    namespace: Option<String>,
    /// Read directories recursively
    #[arg(short = 'R', long)]
    recursive: bool,
    /// Show what would be deleted, without deleting it
    #[arg(long)]
    dry_run: bool,
}

/// Runs `ovlctl apply`.
pub(crate) fn apply(context: &Context, args: &ApplyArgs) -> Result<()> {
    let all = send(context, &args.files, &args.checks, args.dry_run, false)?;
    context.print(&all.objects, |objects| outcome(objects, args.dry_run))
}

/// Runs `ovlctl diff`. Exit status 1 if there are differences, as with `kubectl diff`.
pub(crate) fn diff(context: &Context, args: &DiffArgs) -> Result<ExitCode> {
    let all = send(context, &args.files, &args.checks, true, true)?;
    let changed = all.objects.iter().any(|object| object.action != Action::Unchanged);
    context.print(&all.objects, |objects| objects.iter().map(diff::of_object).collect())?;
    Ok(if changed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn send(context: &Context, files: &Files, checks: &Checks, dry_run: bool, show: bool) -> Result<AppliedAll> {
    let documents = files::read(&files.files, files.recursive)?;
    if documents.is_empty() {
        return Err(Error::Failed("the given files contain no objects".to_owned()));
    }
    let apply = Apply {
        namespace: files.namespace.clone(),
        dry_run,
        validation: checks.validation(),
        strict: checks.strict,
        show,
    };
    let all = stage_and_request(context, documents, &Request::Apply(apply))?;
    warn(&all, checks.validation());
    Ok(all)
}

/// Prints what is unusual in the manifests to standard error.
fn warn(all: &AppliedAll, validation: Validation) {
    let mut lines: Vec<String> = all.warnings.iter().map(ToString::to_string).collect();
    if validation != Validation::Ignore {
        lines.extend(all.ignored.iter().map(ToString::to_string));
    }
    lines.extend(passed_over(&all.foreign));
    for line in lines {
        // Not eprintln!: it panics if standard error is closed.
        let _ = writeln!(io::stderr(), "ovlctl: warning: {}", printable_lines(&line));
    }
}

/// Says how many objects were passed over because ovl does not act on their kinds. `None` if there are none.
fn passed_over(foreign: &BTreeMap<String, usize>) -> Option<String> {
    let count: usize = foreign.values().sum();
    let kinds: Vec<String> = foreign.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    let plural = if count == 1 { "" } else { "s" };
    (count > 0)
        .then(|| format!("passed over {count} object{plural} that ovl does not act on: {}", kinds.join(", ")))
}

/// Stages documents and sends a request that uses them, on one connection.
fn stage_and_request(context: &Context, documents: Vec<Document>, request: &Request) -> Result<AppliedAll> {
    let no_reply = |error| Error::request_failed(error, TIMEOUT_S);
    let mut client =
        Client::connect(&context.socket, Some(Duration::from_secs(TIMEOUT_S))).map_err(no_reply)?;
    for documents in split(documents) {
        match client.request(&Request::Stage { documents }).map_err(no_reply)? {
            Reply::Done => {}
            _ => return Err(Error::unexpected_reply()),
        }
    }
    match client.request(request).map_err(no_reply)? {
        Reply::Applied(all) => Ok(*all),
        Reply::Refused(problems) => {
            let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
            let all = if let [one] = lines.as_slice() {
                one.clone()
            } else {
                format!("\n  {}", lines.join("\n  "))
            };
            Err(Error::Failed(format!("nothing was changed: {all}")))
        }
        _ => Err(Error::unexpected_reply()),
    }
}

/// Splits documents into requests of at most [`MAX_PART_BYTES`] bytes.
fn split(documents: Vec<Document>) -> Vec<Vec<Document>> {
    let mut parts: Vec<Vec<Document>> = Vec::new();
    let mut bytes = MAX_PART_BYTES;
    for document in documents {
        let length = document.value.to_string().len() + document.file.len() + 64;
        bytes += length;
        match parts.last_mut().filter(|_| bytes <= MAX_PART_BYTES) {
            Some(part) => part.push(document),
            None => {
                bytes = length;
                parts.push(vec![document]);
            }
        }
    }
    parts
}

/// Renders the results with the wording of kubectl.
fn outcome(objects: &[Applied], dry_run: bool) -> String {
    let dry = if dry_run { " (dry run)" } else { "" };
    let line = |it: &Applied| {
        let kind = it.kind.qualified();
        match it.action {
            Action::Deleted => format!("{kind} \"{}\" deleted{dry}\n", it.name),
            Action::Absent => format!("{kind} \"{}\" not found\n", it.name),
            Action::Created | Action::Configured | Action::Unchanged => {
                format!("{kind}/{} {}{dry}\n", it.name, it.action)
            }
        }
    };
    objects.iter().map(line).map(|line| printable_lines(&line) + "\n").collect()
}

/// Runs `ovlctl delete`.
pub(crate) fn delete(context: &Context, args: &DeleteArgs) -> Result<()> {
    let documents =
        if args.files.is_empty() { Vec::new() } else { files::read(&args.files, args.recursive)? };
    let keys = args.keys()?;
    if keys.is_empty() && documents.is_empty() {
        return Err(Error::Usage("nothing to delete: give a kind and names, or a file with -f".to_owned()));
    }
    let request = Request::Delete { keys, namespace: args.namespace.clone(), dry_run: args.dry_run };
    let all = stage_and_request(context, documents, &request)?;
    warn(&all, Validation::Strict);
    context.print(&all.objects, |objects| outcome(objects, args.dry_run))
}

impl DeleteArgs {
    fn keys(&self) -> Result<Vec<ResourceKey>> {
        let Some(kind) = &self.kind else { return Ok(Vec::new()) };
        let pairs: Vec<(Kind, String)> = match kind.split_once('/') {
            Some(_) => std::iter::once(kind)
                .chain(&self.names)
                .map(|text| parse_kind_and_name(text))
                .collect::<Result<_>>()?,
            None => {
                let kind = parse_kind(kind)?;
                self.names.iter().map(|name| (kind, name.clone())).collect()
            }
        };
        let namespace = self.namespace.as_deref().unwrap_or(DEFAULT_NAMESPACE);
        let key = |(kind, name): (Kind, String)| {
            let namespace = if kind.is_namespaced() { namespace } else { "" };
            ResourceKey { kind, name: Name::new(namespace, name) }
        };
        Ok(pairs.into_iter().map(key).collect())
    }
}

fn parse_kind_and_name(text: &str) -> Result<(Kind, String)> {
    match text.split_once('/') {
        Some((kind, name)) if !name.is_empty() => Ok((parse_kind(kind)?, name.to_owned())),
        _ => Err(Error::Usage(format!("'{text}' is not KIND/NAME"))),
    }
}

fn parse_kind(text: &str) -> Result<Kind> {
    let lower = text.to_ascii_lowercase();
    Kind::ALL.into_iter().find(|kind| kind.spellings().contains(&lower.as_str())).ok_or_else(|| {
        let all: Vec<&str> = Kind::ALL.iter().filter_map(|kind| kind.spellings().get(1).copied()).collect();
        Error::Usage(format!("unknown kind '{text}': use {} or endpoints", all.join(", ")))
    })
}

/// An item of the kind argument of `get`: objects of a kind, or the backends of Services.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shown {
    Objects(Kind),
    Endpoints,
}

impl Shown {
    fn parse(text: &str) -> Result<Vec<Self>> {
        let mut all = Vec::new();
        for word in text.split(',') {
            match word.to_ascii_lowercase().as_str() {
                "all" => all.extend(
                    [Kind::Pod, Kind::Service, Kind::EndpointSlice, Kind::NetworkPolicy].map(Self::Objects),
                ),
                "ep" | "endpoint" | "endpoints" => all.push(Self::Endpoints),
                _ => all.push(Self::Objects(parse_kind(word)?)),
            }
        }
        Ok(all)
    }
}

/// The objects found for one [`Shown`].
enum Found {
    Objects(Kind, Vec<ResourceInfo>),
    Endpoints(Vec<ServiceBackends>),
}

impl Found {
    fn is_empty(&self) -> bool {
        match self {
            Self::Objects(_, objects) => objects.is_empty(),
            Self::Endpoints(services) => services.is_empty(),
        }
    }
}

impl GetArgs {
    fn find(&self, context: &Context) -> Result<Vec<Found>> {
        let (kinds, name) = match self.kind.split_once('/') {
            Some((kind, name)) if self.name.is_none() => (kind, Some(name.to_owned())),
            _ => (self.kind.as_str(), self.name.clone()),
        };
        let namespace = match (self.all_namespaces, &self.namespace) {
            (true, _) => None,
            (false, namespace) => Some(namespace.clone().unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned())),
        };
        let mut all = Vec::new();
        for shown in Shown::parse(kinds)? {
            let query = |kind| ResourceQuery { kind, namespace: namespace.clone(), name: name.clone() };
            let found = match shown {
                Shown::Objects(kind) => match context.request(&Request::Get(query(kind)))? {
                    Reply::Resources(objects) => Found::Objects(kind, objects),
                    _ => return Err(Error::unexpected_reply()),
                },
                Shown::Endpoints => Found::Endpoints(ask_backends(context, query(Kind::Service))?),
            };
            if let Some(name) = name.as_ref().filter(|_| found.is_empty()) {
                let kind = match shown {
                    Shown::Objects(kind) => kind.qualified(),
                    Shown::Endpoints => "endpoints",
                };
                let place = namespace.as_ref().map(|it| format!(" in namespace {it}")).unwrap_or_default();
                return Err(Error::Failed(format!("{kind} \"{name}\" not found{place}")));
            }
            all.push(found);
        }
        Ok(all)
    }
}

fn ask_backends(context: &Context, query: ResourceQuery) -> Result<Vec<ServiceBackends>> {
    match context.request(&Request::Backends(query))? {
        Reply::Backends(services) => Ok(services),
        _ => Err(Error::unexpected_reply()),
    }
}

/// Runs `ovlctl get`.
pub(crate) fn get(context: &Context, args: &GetArgs) -> Result<()> {
    let found = args.find(context)?;
    let text = match context.output {
        Output::Table | Output::Wide => {
            let show = table::Show { namespaces: args.all_namespaces, wide: context.output == Output::Wide };
            let tables: Vec<String> =
                found.iter().filter(|it| !it.is_empty()).map(|it| table::render(it, show)).collect();
            if tables.is_empty() {
                let place = match (&args.namespace, args.all_namespaces) {
                    (_, true) => String::new(),
                    (namespace, false) => {
                        format!(" in {} namespace", namespace.as_deref().unwrap_or("default"))
                    }
                };
                context.note(&format!("No resources found{place}."));
            }
            tables.join("\n")
        }
        Output::Json => pretty(&manifests(&found, args))? + "\n",
        Output::Yaml => to_yaml(&manifests(&found, args)),
    };
    write_out(&text).map(drop)
}

fn pretty(value: &Value) -> Result<String> {
    serde_json::to_string_pretty(value)
        .map_err(|error| Error::Failed(format!("cannot serialize the objects: {error}")))
}

/// Returns the manifests as kubectl prints them: the object if one was named, otherwise a `List` that can be
/// applied again.
fn manifests(found: &[Found], args: &GetArgs) -> Value {
    let each = found.iter().flat_map(|found| match found {
        Found::Objects(_, objects) => {
            objects.iter().map(|object| object.manifest.clone()).collect::<Vec<_>>()
        }
        Found::Endpoints(services) => services.iter().map(|service| json!(service)).collect(),
    });
    let mut all: Vec<Value> = each.collect();
    let named = args.name.is_some() || args.kind.contains('/');
    match all.pop() {
        Some(one) if named && all.is_empty() => one,
        last => {
            all.extend(last);
            json!({ "apiVersion": "v1", "kind": "List", "items": all })
        }
    }
}

/// Runs `ovlctl describe`.
pub(crate) fn describe(context: &Context, args: &GetArgs) -> Result<()> {
    let mut texts = Vec::new();
    for found in args.find(context)? {
        match found {
            Found::Objects(kind, objects) => {
                for object in objects {
                    let backends = if kind == Kind::Service {
                        let namespace = Some(object.namespace.clone());
                        let query = ResourceQuery { kind, namespace, name: Some(object.name.clone()) };
                        ask_backends(context, query)?.into_iter().next()
                    } else {
                        None
                    };
                    texts.push(describe::object(&object, backends.as_ref()));
                }
            }
            Found::Endpoints(services) => texts.extend(services.iter().map(describe::backends)),
        }
    }
    write_out(&texts.join("\n\n")).map(drop)
}

#[cfg(test)]
mod tests;
