//! `ovlctl apply`, `create`, `label`, `get`, `describe`, `delete` and `diff`: Kubernetes objects, with the wording of
//! kubectl.

mod describe;
mod diff;
mod files;
pub(crate) mod jsonpath;
mod label;
mod selector;
mod table;

pub(crate) use self::label::{LabelArgs, label};

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::ArgAction;
use ovl_control::{
    Action, Applied, AppliedAll, Apply, Client, Document, Reply, Request, ResourceInfo, ResourceQuery,
    ServiceBackends,
};
use ovl_manifest::yaml::to_yaml;
use ovl_proto::resource::{DEFAULT_NAMESPACE, Kind, Labels, Name, ResourceKey, Validation};
use serde_json::{Value, json};

use self::selector::Selector;
use crate::args::{ObjectFormat, Output};
use crate::context::{Context, write_out};
use crate::error::{Error, Result};
use crate::text::{printable, printable_lines};

/// Request timeout in seconds. Ten thousand objects take some seconds to sign and write.
const TIMEOUT_S: u64 = 120;
/// Maximum size of the documents in one request, in bytes, unless it has a single one that is larger.
const MAX_PART_BYTES: usize = 512 << 10;

/// Options that select manifests.
#[derive(Debug, clap::Args)]
pub(crate) struct Files {
    /// A file, a directory of files, or `-` for standard input; may be repeated
    #[arg(short = 'f', long = "filename", value_name = "FILE", required_unless_present = "kustomize")]
    files: Vec<PathBuf>,
    /// Not supported: use `kubectl kustomize DIR | ovlctl apply -f -`
    #[arg(short, long, value_name = "DIR", hide = true)]
    kustomize: Option<PathBuf>,
    /// The namespace of objects that do not name one [default: default]
    #[arg(short, long, value_name = "NS")]
    namespace: Option<String>,
    /// Read directories recursively
    #[arg(short = 'R', long)]
    recursive: bool,
}

/// Arguments of `apply` and `create`.
#[derive(Debug, clap::Args)]
pub(crate) struct ApplyArgs {
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    dry_run: DryRun,
    #[command(flatten)]
    checks: Checks,
}

/// The option `--dry-run`.
#[derive(Debug, clap::Args)]
pub(crate) struct DryRun {
    /// Check everything, but change nothing
    // kubectl has `client` and `server`. Here ovld always checks.
    #[arg(long = "dry-run", num_args = 0..=1, require_equals = true, action = ArgAction::Set, hide_possible_values = true)]
    #[arg(default_value = "none", hide_default_value = true, default_missing_value = "server")]
    #[arg(value_parser = ["none", "client", "server"], value_name = "none|client|server")]
    mode: String,
}

impl DryRun {
    fn is_set(&self) -> bool {
        self.mode != "none"
    }
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
    /// Only the objects of these names
    names: Vec<String>,
    /// Only the objects whose labels match, as `app=web,tier!=back,env in (a,b),!old`
    #[arg(short = 'l', long, value_name = "SELECTOR", value_parser = selector::parse, conflicts_with = "names")]
    selector: Option<Selector>,
    /// The namespace [default: default]
    #[arg(short, long, value_name = "NS", conflicts_with = "all_namespaces")]
    namespace: Option<String>,
    /// List objects of all namespaces
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// Succeed if an object does not exist
    #[arg(long)]
    ignore_not_found: bool,
}

/// Arguments of `delete`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("what").args(["kind", "files"]).required(true))]
pub(crate) struct DeleteArgs {
    /// Kind: `svc`, `pod`, `netpol`, `ns` or `endpointslice`; several separated by commas; or KIND/NAME
    kind: Option<String>,
    /// Names of the objects
    names: Vec<String>,
    /// Delete the objects of a file, a directory of files, or `-` for standard input; may be repeated
    #[arg(short = 'f', long = "filename", value_name = "FILE", conflicts_with = "kind")]
    files: Vec<PathBuf>,
    /// Delete the objects whose labels match
    #[arg(short = 'l', long, value_name = "SELECTOR", value_parser = selector::parse)]
    #[arg(conflicts_with_all = ["names", "files", "all"])]
    selector: Option<Selector>,
    /// Delete all objects of the kind in the namespace
    #[arg(long, conflicts_with_all = ["names", "files"])]
    all: bool,
    /// The namespace [default: default]
    #[arg(short, long, value_name = "NS")]
    namespace: Option<String>,
    /// Read directories recursively
    #[arg(short = 'R', long)]
    recursive: bool,
    #[command(flatten)]
    dry_run: DryRun,
    /// Print nothing about objects that do not exist
    #[arg(long)]
    ignore_not_found: bool,
}

/// Runs `ovlctl apply`, or `ovlctl create`, which fails if an object exists.
pub(crate) fn apply(context: &Context, args: &ApplyArgs, create: bool) -> Result<()> {
    let dry_run = args.dry_run.is_set();
    let apply = Apply { dry_run, create, ..Apply::default() };
    let all = send(context, &args.files, &args.checks, apply)?;
    print(context, &all.objects, dry_run)
}

/// Prints what was done with objects.
fn print(context: &Context, objects: &[Applied], dry_run: bool) -> Result<()> {
    if context.objects == Some(ObjectFormat::Name) {
        let existing = objects.iter().filter(|it| it.action != Action::Absent);
        let lines = existing.map(|it| printable(&format!("{}/{}", it.kind.qualified(), it.name)) + "\n");
        return write_out(&lines.collect::<String>()).map(drop);
    }
    context.print(&objects, |objects| outcome(objects, dry_run))
}

/// Runs `ovlctl diff`. Exit status 1 if there are differences, as with `kubectl diff`.
pub(crate) fn diff(context: &Context, args: &DiffArgs) -> Result<ExitCode> {
    let apply = Apply { dry_run: true, show: true, ..Apply::default() };
    let all = send(context, &args.files, &args.checks, apply)?;
    let changed = all.objects.iter().any(|object| object.action != Action::Unchanged);
    context.print(&all.objects, |objects| objects.iter().map(diff::of_object).collect())?;
    Ok(if changed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn send(context: &Context, files: &Files, checks: &Checks, apply: Apply) -> Result<AppliedAll> {
    if let Some(folder) = &files.kustomize {
        let folder = folder.display();
        return Err(Error::Usage(format!(
            "ovlctl builds no kustomizations: use `kubectl kustomize {folder} | ovlctl apply -f -`"
        )));
    }
    let documents = files::read(&files.files, files.recursive)?;
    if documents.is_empty() {
        return Err(Error::Failed("the given files contain no objects".to_owned()));
    }
    let apply = Apply {
        namespace: files.namespace.clone(),
        validation: checks.validation(),
        strict: checks.strict,
        ..apply
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

/// Splits documents into requests of at most [`MAX_PART_BYTES`] bytes, or with one document that is larger.
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
    let keys = args.keys(context)?;
    if keys.is_empty() && documents.is_empty() {
        if args.all || args.selector.is_some() {
            context.note("No resources found.");
            return print(context, &[], false);
        }
        return Err(Error::Usage(
            "nothing to delete: give a kind and names, --all or -l, or a file with -f".to_owned(),
        ));
    }
    let dry_run = args.dry_run.is_set();
    let request = Request::Delete { keys, namespace: args.namespace.clone(), dry_run };
    let mut all = stage_and_request(context, documents, &request)?;
    warn(&all, Validation::Strict);
    if args.ignore_not_found {
        all.objects.retain(|it| it.action != Action::Absent);
    }
    print(context, &all.objects, dry_run)
}

impl DeleteArgs {
    fn keys(&self, context: &Context) -> Result<Vec<ResourceKey>> {
        let Some(kind) = &self.kind else { return Ok(Vec::new()) };
        let pairs: Vec<(Kind, String)> = if kind.contains('/') {
            std::iter::once(kind)
                .chain(&self.names)
                .map(|text| parse_kind_and_name(text))
                .collect::<Result<_>>()?
        } else {
            let kinds = kind.split(',').map(parse_kind).collect::<Result<Vec<Kind>>>()?;
            if self.all || self.selector.is_some() {
                return self.matching(context, &kinds);
            }
            let names = |kind: Kind| self.names.iter().map(move |name| (kind, name.clone()));
            kinds.into_iter().flat_map(names).collect()
        };
        let key = |(kind, name)| key(kind, self.namespace.as_deref(), name);
        Ok(pairs.into_iter().map(key).collect())
    }

    /// Returns the objects that `--all` or `-l` selects.
    fn matching(&self, context: &Context, kinds: &[Kind]) -> Result<Vec<ResourceKey>> {
        let namespace = Some(self.namespace.clone().unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned()));
        let mut keys = Vec::new();
        for kind in kinds {
            let query = ResourceQuery { kind: *kind, namespace: namespace.clone(), name: None };
            let found = ask_objects(context, query)?;
            let selected = found.into_iter().filter(|it| is_selected(self.selector.as_ref(), it));
            keys.extend(
                selected.map(|it| ResourceKey { kind: *kind, name: Name::new(it.namespace, it.name) }),
            );
        }
        Ok(keys)
    }
}

/// Returns the key of an object. `namespace`: `None` is `default`.
fn key(kind: Kind, namespace: Option<&str>, name: String) -> ResourceKey {
    let namespace = if kind.is_namespaced() { namespace.unwrap_or(DEFAULT_NAMESPACE) } else { "" };
    ResourceKey { kind, name: Name::new(namespace, name) }
}

/// Whether a selector matches the labels of an object. No selector matches all.
fn is_selected(selector: Option<&Selector>, object: &ResourceInfo) -> bool {
    let labels = || {
        let labels = object.manifest.pointer("/metadata/labels").cloned().unwrap_or_default();
        serde_json::from_value::<Labels>(labels).unwrap_or_default()
    };
    selector.is_none_or(|selector| selector.matches(&labels()))
}

fn ask_objects(context: &Context, query: ResourceQuery) -> Result<Vec<ResourceInfo>> {
    match context.request(&Request::Get(query))? {
        Reply::Resources(objects) => Ok(objects),
        _ => Err(Error::unexpected_reply()),
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
    /// Returns the qualified name that kubectl prints.
    fn qualified(self) -> &'static str {
        match self {
            Self::Objects(kind) => kind.qualified(),
            Self::Endpoints => "endpoints",
        }
    }

    fn none(self) -> Found {
        match self {
            Self::Objects(kind) => Found::Objects(kind, Vec::new()),
            Self::Endpoints => Found::Endpoints(Vec::new()),
        }
    }

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
    /// Adds what a query finds. Returns whether it found something.
    fn extend(
        &mut self,
        context: &Context,
        selector: Option<&Selector>,
        query: impl Fn(Kind) -> ResourceQuery,
    ) -> Result<bool> {
        match self {
            Self::Objects(kind, objects) => {
                let mut found = ask_objects(context, query(*kind))?;
                found.retain(|it| is_selected(selector, it));
                let is_new = !found.is_empty();
                objects.extend(found);
                Ok(is_new)
            }
            Self::Endpoints(services) => {
                let mut found = ask_backends(context, query(Kind::Service))?;
                if selector.is_some() {
                    let mut selected = ask_objects(context, query(Kind::Service))?;
                    selected.retain(|it| is_selected(selector, it));
                    let names: BTreeSet<(String, String)> =
                        selected.into_iter().map(|it| (it.namespace, it.name)).collect();
                    found.retain(|it| names.contains(&(it.namespace.clone(), it.name.clone())));
                }
                let is_new = !found.is_empty();
                services.extend(found);
                Ok(is_new)
            }
        }
    }

    /// Returns `KIND/NAME` of each object.
    fn names(&self) -> Vec<String> {
        match self {
            Self::Objects(kind, objects) => {
                objects.iter().map(|it| format!("{}/{}", kind.qualified(), it.name)).collect()
            }
            Self::Endpoints(services) => services.iter().map(|it| format!("endpoints/{}", it.name)).collect(),
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::Objects(_, objects) => objects.is_empty(),
            Self::Endpoints(services) => services.is_empty(),
        }
    }
}

impl GetArgs {
    /// Returns what is asked for, each with the names. No names: all objects.
    fn asked(&self) -> Result<Vec<(Shown, Vec<String>)>> {
        if !self.kind.contains('/') {
            return Ok(Shown::parse(&self.kind)?
                .into_iter()
                .map(|shown| (shown, self.names.clone()))
                .collect());
        }
        let mut asked: Vec<(Shown, Vec<String>)> = Vec::new();
        for text in std::iter::once(&self.kind).chain(&self.names) {
            let malformed = || Error::Usage(format!("'{text}' is not KIND/NAME"));
            let (kind, name) =
                text.split_once('/').filter(|(_, name)| !name.is_empty()).ok_or_else(malformed)?;
            for shown in Shown::parse(kind)? {
                match asked.iter_mut().find(|(known, _)| *known == shown) {
                    Some((_, names)) => names.push(name.to_owned()),
                    None => asked.push((shown, vec![name.to_owned()])),
                }
            }
        }
        Ok(asked)
    }

    /// Whether exactly one object is asked for.
    fn is_single(&self) -> bool {
        self.asked().is_ok_and(|asked| matches!(asked.as_slice(), [(_, names)] if names.len() == 1))
    }

    /// Returns the objects that were found, and the error about those that were not.
    fn find(&self, context: &Context) -> Result<(Vec<Found>, Option<Error>)> {
        let namespace = match (self.all_namespaces, &self.namespace) {
            (true, _) => None,
            (false, namespace) => Some(namespace.clone().unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned())),
        };
        let (mut all, mut missing) = (Vec::new(), Vec::new());
        for (shown, names) in self.asked()? {
            let mut found = shown.none();
            let queries: Vec<Option<String>> =
                if names.is_empty() { vec![None] } else { names.into_iter().map(Some).collect() };
            for name in queries {
                let query = |kind| ResourceQuery { kind, namespace: namespace.clone(), name: name.clone() };
                let is_new = found.extend(context, self.selector.as_ref(), query)?;
                if let Some(name) = name.filter(|_| !is_new) {
                    let place =
                        namespace.as_ref().map(|it| format!(" in namespace {it}")).unwrap_or_default();
                    missing.push(format!("{} \"{name}\" not found{place}", shown.qualified()));
                }
            }
            all.push(found);
        }
        let missing = Some(missing).filter(|missing| !missing.is_empty() && !self.ignore_not_found);
        Ok((all, missing.map(|missing| Error::Failed(missing.join("\n")))))
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
    let (found, missing) = args.find(context)?;
    write_out(&rendered(context, args, &found, missing.is_some())?).map(drop)?;
    missing.map_or(Ok(()), Err)
}

/// Renders objects. `incomplete`: some were not found, which is an error of its own.
fn rendered(context: &Context, args: &GetArgs, found: &[Found], incomplete: bool) -> Result<String> {
    match &context.objects {
        Some(ObjectFormat::Name) => {
            let names = found.iter().flat_map(Found::names);
            return Ok(names.map(|name| printable(&name) + "\n").collect());
        }
        Some(ObjectFormat::JsonPath(_)) if args.is_single() && found.iter().all(Found::is_empty) => {
            return Ok(String::new());
        }
        Some(ObjectFormat::JsonPath(template)) => return Ok(template.render(&manifests(found, args))),
        None => {}
    }
    if incomplete && found.iter().all(Found::is_empty) {
        return Ok(String::new());
    }
    Ok(match context.output {
        Output::Table | Output::Wide => {
            let show = table::Show { namespaces: args.all_namespaces, wide: context.output == Output::Wide };
            let tables: Vec<String> =
                found.iter().filter(|it| !it.is_empty()).map(|it| table::render(it, show)).collect();
            if tables.is_empty() && !args.ignore_not_found {
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
        Output::Json => pretty(&manifests(found, args))? + "\n",
        Output::Yaml => to_yaml(&manifests(found, args)),
    })
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
    match all.pop() {
        Some(one) if args.is_single() && all.is_empty() => one,
        last => {
            all.extend(last);
            json!({ "apiVersion": "v1", "kind": "List", "items": all })
        }
    }
}

/// Runs `ovlctl describe`.
pub(crate) fn describe(context: &Context, args: &GetArgs) -> Result<()> {
    let mut texts = Vec::new();
    let (found, missing) = args.find(context)?;
    for found in found {
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
    write_out(&texts.join("\n\n")).map(drop)?;
    missing.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests;
