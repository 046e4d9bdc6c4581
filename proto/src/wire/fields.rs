//! Records as lists of numbered fields, so that a release can add a field and others keep it.
//!
//! A list has, for each field in ascending order of the numbers: a varint (LEB128) of the number times two, plus one if
//! the field is *marked*; a varint of the length of the value; the value, in bincode. A field that has its default is
//! absent. So each value has one encoding, and its hash is the same on all hosts.
//!
//! A host that does not know a field keeps its bytes ([`Unknown`]) and writes them again. If the field is marked, the
//! host does not understand the value, and must not act on it: to decode it fails with [`WireError::NotUnderstood`].
//! `docs/upgrades.md` has the rules for whoever adds a field.

use data_encoding::BASE64_NOPAD;
use serde::de::{DeserializeOwned, Error as _, Visitor};
use serde::ser::Error as _;
use serde::{Deserializer, Serialize, Serializer};

use super::{WireError, bare};

/// The maximum number of fields of a value.
pub const MAX_FIELDS: usize = 256;
/// The maximum length of an error that may quote what was received, in characters.
const MAX_QUOTED: usize = 200;
/// The highest number of a field.
pub const MAX_NUMBER: u32 = (1 << 28) - 1;

/// The fields of a value that this release does not know, as they were received. Empty on almost every value, and then
/// without an allocation.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Unknown(Option<Box<[u8]>>);

impl std::fmt::Debug for Unknown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.numbers()).finish()
    }
}

impl Unknown {
    /// Returns the numbers of the fields, in ascending order.
    pub fn numbers(&self) -> impl Iterator<Item = u32> {
        self.fields().map(|field| field.number)
    }

    /// Returns the encoded value of a field; `None` if there is none with this number.
    pub fn get(&self, number: u32) -> Option<&[u8]> {
        self.fields().find(|field| field.number == number).map(|field| field.value)
    }

    /// Adds a field, or replaces the one with its number.
    pub fn set(&mut self, number: u32, marked: bool, value: &[u8]) {
        let number = number.min(MAX_NUMBER);
        let mut all: Vec<RawField<'_>> = self.fields().filter(|field| field.number != number).collect();
        all.push(RawField { number, marked, value });
        all.sort_by_key(|field| field.number);
        let mut bytes = Vec::new();
        for field in all {
            field.write(&mut bytes);
        }
        self.0 = Some(bytes.into());
    }

    /// Adds a field of a later release, if this daemon plays one for a test: see [`is_played`]. Nothing otherwise.
    #[must_use]
    pub fn played(mut self) -> Self {
        if is_played("1") {
            self.set(PLAYED_FIELD, false, b"added");
        }
        self
    }

    /// As [`Self::played`], with a marked field.
    #[must_use]
    pub fn played_marked(mut self) -> Self {
        if is_played("marked") {
            self.set(PLAYED_FIELD, true, b"added");
        }
        self
    }

    fn fields(&self) -> impl Iterator<Item = RawField<'_>> {
        let mut rest = self.0.as_deref().unwrap_or_default();
        // The bytes were checked when they were received.
        std::iter::from_fn(move || if rest.is_empty() { None } else { RawField::read(&mut rest).ok() })
    }
}

/// The number of the field that a played later release has.
pub const PLAYED_FIELD: u32 = 1_000_000;

/// Whether this daemon plays a later release, which has the field [`PLAYED_FIELD`]. Only debug builds do, if the variable
/// `OVL_TEST_ADDED_FIELD` says so: with `1` in its record, state file, endpoints, networks and allocation maps; with
/// `marked` in its networks, marked.
fn is_played(how: &str) -> bool {
    #[cfg(debug_assertions)]
    {
        static PLAYED: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
        PLAYED.get_or_init(|| std::env::var("OVL_TEST_ADDED_FIELD").ok()).as_deref() == Some(how)
    }
    #[cfg(not(debug_assertions))]
    {
        let _ = how;
        false
    }
}

/// One encoded field.
#[derive(Debug, Clone, Copy)]
struct RawField<'a> {
    number: u32,
    marked: bool,
    value: &'a [u8],
}

impl<'a> RawField<'a> {
    fn write(self, out: &mut Vec<u8>) {
        write_varint(out, u64::from(self.number) << 1 | u64::from(self.marked));
        write_varint(out, self.value.len() as u64);
        out.extend_from_slice(self.value);
    }

    fn read(rest: &mut &'a [u8]) -> Result<Self, WireError> {
        let tag = read_varint(rest)?;
        let number = u32::try_from(tag >> 1).ok().filter(|number| *number <= MAX_NUMBER);
        let number = number.ok_or_else(|| malformed("a field with a number that is too large"))?;
        let length = usize::try_from(read_varint(rest)?).unwrap_or(usize::MAX);
        let (value, behind) = rest
            .split_at_checked(length)
            .ok_or_else(|| malformed("a field that is longer than its record"))?;
        *rest = behind;
        Ok(Self { number, marked: tag & 1 == 1, value })
    }
}

/// Writes the fields of a value.
#[derive(Debug, Default)]
pub struct Writer<'a> {
    out: Vec<u8>,
    scratch: Vec<u8>,
    /// The unknown fields that are not written yet.
    unknown: &'a [u8],
}

impl<'a> Writer<'a> {
    /// Begins a value with these unknown fields.
    pub fn new(unknown: Option<&'a Unknown>) -> Self {
        let unknown = unknown.and_then(|unknown| unknown.0.as_deref()).unwrap_or_default();
        Self { out: Vec::with_capacity(128), scratch: Vec::with_capacity(64), unknown }
    }

    /// Writes a field. The numbers ascend.
    ///
    /// # Errors
    ///
    /// The value cannot be encoded.
    pub fn put<T: Serialize + ?Sized>(
        &mut self,
        number: u32,
        marked: bool,
        value: &T,
    ) -> Result<(), WireError> {
        self.pass_unknown(number);
        self.scratch.clear();
        bare::encode_into(value, &mut self.scratch)?;
        RawField { number, marked, value: &self.scratch }.write(&mut self.out);
        Ok(())
    }

    /// Writes a field, unless it has its default.
    ///
    /// # Errors
    ///
    /// The value cannot be encoded.
    pub fn put_optional<T: Serialize + Default + PartialEq>(
        &mut self,
        number: u32,
        marked: bool,
        value: &T,
    ) -> Result<(), WireError> {
        if *value == T::default() { Ok(()) } else { self.put(number, marked, value) }
    }

    /// Returns the list of fields.
    pub fn finish(mut self) -> Vec<u8> {
        self.out.extend_from_slice(self.unknown);
        self.out
    }

    /// Writes the unknown fields below a number.
    fn pass_unknown(&mut self, below: u32) {
        let mut rest = self.unknown;
        while let Ok(field) = RawField::read(&mut rest)
            && field.number < below
        {
            field.write(&mut self.out);
            self.unknown = rest;
        }
    }
}

/// Reads the fields of a value.
#[derive(Debug)]
pub struct Reader<'a> {
    /// The type, for errors.
    what: &'static str,
    rest: &'a [u8],
    next: Option<RawField<'a>>,
    count: usize,
    unknown: Vec<u8>,
    /// The first unknown field that is marked.
    marked: Option<u32>,
}

impl<'a> Reader<'a> {
    /// Begins to read a value of a type that is called `what` in errors.
    ///
    /// # Errors
    ///
    /// The first field is malformed.
    pub fn new(what: &'static str, bytes: &'a [u8]) -> Result<Self, WireError> {
        let mut reader = Self { what, rest: bytes, next: None, count: 0, unknown: Vec::new(), marked: None };
        reader.advance(None)?;
        Ok(reader)
    }

    /// Reads a field that every value has. The numbers ascend.
    ///
    /// # Errors
    ///
    /// The field is absent or malformed.
    pub fn need<T: DeserializeOwned>(&mut self, number: u32, marked: bool) -> Result<T, WireError> {
        let what = self.what;
        self.take(number, marked)?
            .ok_or_else(|| malformed(&format!("{what} without its field {number}")))
            .and_then(|value| self.decode(number, value))
    }

    /// Reads a field that is absent if it has its default.
    ///
    /// # Errors
    ///
    /// The field is malformed, or has its default although it is there.
    pub fn optional<T: DeserializeOwned + Default + PartialEq>(
        &mut self,
        number: u32,
        marked: bool,
    ) -> Result<T, WireError> {
        let Some(value) = self.take(number, marked)? else { return Ok(T::default()) };
        let value = self.decode(number, value)?;
        if value == T::default() {
            return Err(malformed(&format!(
                "{} with its field {number} written although it is empty",
                self.what
            )));
        }
        Ok(value)
    }

    /// Reads the bytes of a field that every value has, which are bytes themselves.
    pub(crate) fn bytes(&mut self, number: u32) -> Result<&'a [u8], WireError> {
        let value = self.take(number, false)?;
        value
            .ok_or_else(|| malformed(&format!("{} without its field {number}", self.what)))
            .and_then(super::fields_of)
    }

    /// Ends a value, and returns the fields that this release does not know.
    ///
    /// # Errors
    ///
    /// A field is malformed, or an unknown one is marked.
    pub fn finish(mut self) -> Result<Unknown, WireError> {
        self.pass(MAX_NUMBER.saturating_add(1))?;
        match self.marked {
            Some(number) if !(number == PLAYED_FIELD && is_played("marked")) => {
                Err(WireError::NotUnderstood(format!("field {number} of {}", self.what)))
            }
            _ if self.unknown.is_empty() => Ok(Unknown::default()),
            _ => Ok(Unknown(Some(self.unknown.into()))),
        }
    }

    fn decode<T: DeserializeOwned>(&self, number: u32, value: &[u8]) -> Result<T, WireError> {
        super::decode_body(value).map_err(|error| match error {
            WireError::Malformed(why) => malformed(&format!("field {number} of {}: {why}", self.what)),
            other => other,
        })
    }

    fn take(&mut self, number: u32, marked: bool) -> Result<Option<&'a [u8]>, WireError> {
        self.pass(number)?;
        let Some(field) = self.next.filter(|field| field.number == number) else { return Ok(None) };
        if field.marked != marked {
            return Err(malformed(&format!("field {number} of {} with another mark", self.what)));
        }
        self.advance(Some(number))?;
        Ok(Some(field.value))
    }

    /// Keeps the fields below a number as unknown ones.
    fn pass(&mut self, below: u32) -> Result<(), WireError> {
        while let Some(field) = self.next.filter(|field| field.number < below) {
            field.write(&mut self.unknown);
            if field.marked {
                self.marked = self.marked.or(Some(field.number));
            }
            self.advance(Some(field.number))?;
        }
        Ok(())
    }

    fn advance(&mut self, last: Option<u32>) -> Result<(), WireError> {
        if self.rest.is_empty() {
            self.next = None;
            return Ok(());
        }
        self.count = self.count.saturating_add(1);
        if self.count > MAX_FIELDS {
            return Err(malformed(&format!("{} with more than {MAX_FIELDS} fields", self.what)));
        }
        let field = RawField::read(&mut self.rest)?;
        if last.is_some_and(|last| last >= field.number) {
            return Err(malformed(&format!("{} with fields out of order", self.what)));
        }
        self.next = Some(field);
        Ok(())
    }
}

fn malformed(why: &str) -> WireError {
    WireError::Malformed(why.to_owned())
}

fn write_varint(out: &mut Vec<u8>, mut value: u64) {
    while value > 0x7f {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Reads a varint of at most 35 bits, in its shortest form.
fn read_varint(rest: &mut &[u8]) -> Result<u64, WireError> {
    let mut value = 0;
    for shift in [0, 7, 14, 21, 28] {
        let Some((&byte, behind)) = rest.split_first() else { break };
        *rest = behind;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return if byte == 0 && shift > 0 {
                Err(malformed("a number that is not in its shortest form"))
            } else {
                Ok(value)
            };
        }
    }
    Err(malformed("a number that is cut short or too large"))
}

/// A type whose encoding is a list of fields. [`fields!`](crate::fields) implements it.
pub trait Fields: Sized {
    /// The name of the type in errors.
    const WHAT: &'static str;

    /// Encodes the fields.
    ///
    /// # Errors
    ///
    /// A field cannot be encoded.
    fn to_fields(&self) -> Result<Vec<u8>, WireError>;

    /// Decodes the fields.
    ///
    /// # Errors
    ///
    /// The bytes are malformed, or have a marked field that this release does not know.
    fn from_fields(bytes: &[u8]) -> Result<Self, WireError>;
}

/// Serializes a value as its list of fields: bytes on the wire, Base64 text in JSON, for files that ovld reads again.
///
/// # Errors
///
/// A field cannot be encoded.
pub fn serialize<T: Fields, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    let fields = value.to_fields().map_err(S::Error::custom)?;
    if serializer.is_human_readable() {
        serializer.serialize_str(&BASE64_NOPAD.encode(&fields))
    } else {
        serializer.serialize_bytes(&fields)
    }
}

/// Deserializes what [`serialize`] writes.
///
/// # Errors
///
/// The bytes are malformed, or have a marked field that this release does not know.
pub fn deserialize<'de, T: Fields, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    struct FieldsVisitor<T>(std::marker::PhantomData<T>);

    impl<T: Fields> Visitor<'_> for FieldsVisitor<T> {
        type Value = T;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str(T::WHAT)
        }

        fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<T, E> {
            T::from_fields(bytes).map_err(E::custom)
        }

        fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
            self.visit_bytes(&BASE64_NOPAD.decode(text.as_bytes()).map_err(E::custom)?)
        }
    }

    let visitor = FieldsVisitor(std::marker::PhantomData);
    if deserializer.is_human_readable() {
        deserializer.deserialize_str(visitor)
    } else {
        deserializer.deserialize_bytes(visitor)
    }
}

/// A value of an enum with numbered variants: the number, and the encoded content.
///
/// # Errors
///
/// The bytes are malformed.
pub(crate) fn deserialize_numbered<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<(u32, &'de [u8]), D::Error> {
    serde::Deserialize::deserialize(deserializer)
}

/// Serializes a value of an enum with numbered variants.
///
/// # Errors
///
/// Those of the serializer.
pub(crate) fn serialize_numbered<S: Serializer>(
    number: u32,
    content: Result<Vec<u8>, WireError>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let content = content.map_err(S::Error::custom)?;
    (number, super::Bytes(&content)).serialize(serializer)
}

/// Deserializes an enum with numbered variants. `read` decodes the content, and returns `None` if the number is unknown.
///
/// Whatever is wrong with the content, the value is [`WireError::NotUnderstood`]: a later release may have made it.
///
/// # Errors
///
/// The value is malformed or not understood.
pub(crate) fn deserialize_variant<'de, T, D: Deserializer<'de>>(
    what: &str,
    deserializer: D,
    read: impl FnOnce(u32, &[u8]) -> Option<Result<T, WireError>>,
) -> Result<T, D::Error> {
    let (number, content) = deserialize_numbered(deserializer)?;
    let error = match read(number, content) {
        Some(Ok(value)) => return Ok(value),
        Some(Err(WireError::NotUnderstood(why))) => WireError::NotUnderstood(why),
        Some(Err(error)) => {
            // It may quote what was received.
            let error: String = error.to_string().chars().take(MAX_QUOTED).collect();
            WireError::NotUnderstood(format!("{what} {number} ({error})"))
        }
        None => WireError::NotUnderstood(format!("{what} {number}")),
    };
    Err(D::Error::custom(error))
}

/// Declares the fields of a struct: their numbers, which never change, and for each how its absence is treated.
///
/// ```text
/// fields! { Name { 1 id, 2 labels optional, 3 limit marked, ..unknown } }
/// ```
///
/// * `1 id`: every value has the field.
/// * `2 labels optional`: it is absent if it has its default, which never changes.
/// * `3 limit marked`: as `optional`, and whoever does not know the field must not act on the value.
/// * `..unknown`: the member of type [`Unknown`] that keeps what this release does not know. Without it, unknown fields
///   are dropped: for what is neither kept nor passed on.
///
/// With `json` before the name, the type is derived as well, with `#[serde(remote = "Self")]`, and formats that people
/// read use that.
#[macro_export]
macro_rules! fields {
    (json $name:ident { $($fields:tt)* }) => {
        $crate::fields!(@impl $name { $($fields)* });

        impl $crate::serde::Serialize for $name {
            fn serialize<S: $crate::serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() {
                    Self::serialize(self, serializer)
                } else {
                    $crate::wire::fields::serialize(self, serializer)
                }
            }
        }

        impl<'de> $crate::serde::Deserialize<'de> for $name {
            fn deserialize<D: $crate::serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    Self::deserialize(deserializer)
                } else {
                    $crate::wire::fields::deserialize(deserializer)
                }
            }
        }
    };
    ($name:ident { $($fields:tt)* }) => {
        $crate::fields!(@impl $name { $($fields)* });

        impl $crate::serde::Serialize for $name {
            fn serialize<S: $crate::serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                $crate::wire::fields::serialize(self, serializer)
            }
        }

        impl<'de> $crate::serde::Deserialize<'de> for $name {
            fn deserialize<D: $crate::serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                $crate::wire::fields::deserialize(deserializer)
            }
        }
    };
    (@impl $name:ident {
        $($number:literal $field:ident $($mark:ident)?),+ $(, ..$unknown:ident)? $(,)?
    }) => {
        impl $crate::wire::fields::Fields for $name {
            const WHAT: &'static str = stringify!($name);

            fn to_fields(&self) -> Result<Vec<u8>, $crate::wire::WireError> {
                let Self { $($field,)+ $($unknown)? } = self;
                let mut writer = $crate::wire::fields::Writer::new($crate::fields!(@unknown $($unknown)?));
                $($crate::fields!(@put writer $number $field $($mark)?);)+
                Ok(writer.finish())
            }

            fn from_fields(bytes: &[u8]) -> Result<Self, $crate::wire::WireError> {
                let mut reader = $crate::wire::fields::Reader::new(Self::WHAT, bytes)?;
                $(let $field = $crate::fields!(@take reader $number $($mark)?);)+
                let _unknown = reader.finish()?;
                Ok(Self { $($field,)+ $($unknown: _unknown)? })
            }
        }
    };
    (@unknown) => { None };
    (@unknown $unknown:ident) => { Some($unknown) };
    (@put $writer:ident $number:literal $value:expr) => { $writer.put($number, false, $value)? };
    (@put $writer:ident $number:literal $value:ident optional) => { $writer.put_optional($number, false, $value)? };
    (@put $writer:ident $number:literal $value:ident marked) => { $writer.put_optional($number, true, $value)? };
    (@take $reader:ident $number:literal) => { $reader.need($number, false)? };
    (@take $reader:ident $number:literal optional) => { $reader.optional($number, false)? };
    (@take $reader:ident $number:literal marked) => { $reader.optional($number, true)? };
}

/// Declares the variants of an enum of messages: their numbers, and the fields of each, as [`fields!`](crate::fields)
/// does. A member without a name is written `0: name`. Unknown fields are dropped, and an unknown variant is
/// [`WireError::NotUnderstood`].
macro_rules! variants {
    ($name:ident {
        $($variant_number:literal $variant:ident {
            $($number:literal $member:tt: $field:ident $($mark:ident)?),* $(,)?
        }),+ $(,)?
    }) => {
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                let (number, content) = match self {
                    $(Self::$variant { $($member: $field),* } => {
                        let content = || {
                            #[allow(unused_mut, reason = "variants without members")]
                            let mut writer = $crate::wire::fields::Writer::new(None);
                            $($crate::fields!(@put writer $number $field $($mark)?);)*
                            Ok(writer.finish())
                        };
                        ($variant_number, content())
                    })+
                };
                $crate::wire::fields::serialize_numbered(number, content, serializer)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                $crate::wire::fields::deserialize_variant(stringify!($name), deserializer, |number, content| {
                    match number {
                        $($variant_number => Some((|| {
                            #[allow(unused_mut, reason = "variants without members")]
                            let mut reader =
                                $crate::wire::fields::Reader::new(stringify!($name), content)?;
                            $(let $field = $crate::fields!(@take reader $number $($mark)?);)*
                            reader.finish()?;
                            Ok(Self::$variant { $($member: $field),* })
                        })()),)+
                        _ => None,
                    }
                })
            }
        }
    };
}

pub(crate) use variants;

#[cfg(test)]
mod tests;
