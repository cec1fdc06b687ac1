//! The fields of a type as serde sees them: a deserializer that gives every field a value, and keeps the names.

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, IntoDeserializer, MapAccess, SeqAccess, Visitor, value::Error},
    forward_to_deserialize_any,
};

/// The paths of all fields of `T` that hold a value.
pub fn fields_of<T: for<'de> Deserialize<'de>>() -> Vec<String> {
    let mut found = Vec::new();
    let at = At {
        path: String::new(),
        found: &mut found,
    };
    if let Err(error) = T::deserialize(at) {
        panic!("{error}, after {:?}", found.last());
    }
    found.dedup();
    found
}

struct At<'a> {
    path: String,
    found: &'a mut Vec<String>,
}

impl At<'_> {
    fn leaf(&mut self) {
        self.found.push(self.path.clone());
    }

    fn below(&mut self, key: &str) -> At<'_> {
        At {
            path: super::join(&self.path, key),
            found: self.found,
        }
    }
}

macro_rules! leaves {
    ($($method:ident => $visit:ident($($value:expr)?)),* $(,)?) => {
        $(fn $method<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, Error> {
            self.leaf();
            visitor.$visit($($value)?)
        })*
    };
}

impl<'de> Deserializer<'de> for At<'_> {
    type Error = Error;

    leaves! {
        deserialize_any => visit_unit(),
        deserialize_bool => visit_bool(true),
        deserialize_i32 => visit_i32(1),
        deserialize_i64 => visit_i64(1),
        deserialize_u16 => visit_u16(1),
        deserialize_u32 => visit_u32(1),
        deserialize_u64 => visit_u64(1),
    }

    fn deserialize_string<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, Error> {
        self.leaf();
        // Strings whose form is checked are capabilities and lists of CPUs.
        let capability = self.path.contains("capabilities");
        visitor.visit_str(if capability { "CAP_CHOWN" } else { "0" })
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_string(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        mut self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.leaf();
        visitor.visit_enum(variants[0].into_deserializer())
    }

    fn deserialize_seq<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, Error> {
        let path = self.path.clone();
        visitor.visit_seq(Entries {
            at: &mut self,
            keys: vec![path],
        })
    }

    fn deserialize_map<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_map(Entries {
            at: &mut self,
            keys: vec!["*".into()],
        })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        mut self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_map(Entries {
            at: &mut self,
            keys: fields.iter().rev().map(ToString::to_string).collect(),
        })
    }

    forward_to_deserialize_any! {
        i8 i16 i128 u8 u128 f32 f64 char bytes byte_buf unit unit_struct tuple tuple_struct identifier ignored_any
    }
}

/// What is still to be given, the next one last.
struct Entries<'a, 'b> {
    at: &'a mut At<'b>,
    keys: Vec<String>,
}

impl<'de> SeqAccess<'de> for Entries<'_, '_> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Error> {
        let element = self.keys.pop().map(|path| At {
            path,
            found: self.at.found,
        });
        element.map(|at| seed.deserialize(at)).transpose()
    }
}

impl<'de> MapAccess<'de> for Entries<'_, '_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        let key = self.keys.last().map(String::as_str);
        key.map(|key| seed.deserialize(key.into_deserializer()))
            .transpose()
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let key = self.keys.pop().unwrap_or_default();
        seed.deserialize(self.at.below(&key))
    }
}
